"""Checkpoints: exact state, nothing half-written whatever kills the run, nothing altered ever loaded."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem, _MockFileSystem

from rlhf_ray.checkpoint import CheckpointError, CheckpointStore, load_tree, save_tree, verify
from rlhf_ray.rundir.lock import RunLock
from rlhf_ray.storage import Mirror

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]


def fill(folder: Path, value: int = 7) -> None:
    """A small checkpoint with a sub-folder and a state tree."""
    (folder / "policy").mkdir()
    (folder / "policy" / "config.json").write_text(json.dumps({"value": value}))
    save_tree(folder / "state", {"value": value, "weights": torch.full((64,), float(value))})


def value_of(folder: Path) -> int:
    return json.loads((folder / "policy" / "config.json").read_text())["value"]


def store_of(root: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(root, **({"keep": 3} | options))


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def same(a: Any, b: Any) -> bool:
    """Equality of types, dtypes and bits; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, dict):
        kinds = [[(type(key), key) for key in x] for x in (a, b)]
        return kinds[0] == kinds[1] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


# State trees


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    raw = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8)
    raw = raw % 2 if dtype == torch.bool else raw
    return raw.view(dtype).reshape(shape) if size else torch.zeros(shape, dtype=dtype)


text = st.text(max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text
keys = text | st.integers(-3, 3) | st.none() | st.floats(allow_nan=False)
trees = st.recursive(
    scalars | tensors(),
    lambda leaf: (
        st.lists(leaf, max_size=3) | st.lists(leaf, max_size=3).map(tuple) | st.dictionaries(keys, leaf, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trees)
def test_a_state_tree_comes_back_bit_for_bit(tmp_path: Path, tree: Any) -> None:
    save_tree(tmp_path / "state", tree)
    assert same(load_tree(tmp_path / "state"), tree)


def test_the_tag_names_of_the_format_are_ordinary_content(tmp_path: Path) -> None:
    tree = {"tuple": [1], "tensor": "0", "dict": {"float": "nan", 0: (1,), True: 1}, "__metadata__": {}}
    save_tree(tmp_path / "state", tree)
    assert same(load_tree(tmp_path / "state"), tree)


def test_optimiser_and_generator_continue_exactly(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.AdamW, torch.Generator]:
        model = torch.nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1), torch.Generator().manual_seed(3)

    def step(model: torch.nn.Linear, optimiser: torch.optim.AdamW, generator: torch.Generator) -> None:
        optimiser.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().sum().backward()
        optimiser.step()

    first = make()
    step(*first)
    state = [first[0].state_dict(), first[1].state_dict(), first[2].get_state(), random.Random(5).getstate()]
    save_tree(tmp_path / "state", state)
    second = make()
    loaded = load_tree(tmp_path / "state")
    second[0].load_state_dict(loaded[0])
    second[1].load_state_dict(loaded[1])
    second[2].set_state(loaded[2])
    step(*first)
    step(*second)
    assert torch.equal(first[0].weight, second[0].weight)
    assert set(loaded[1]["state"]) == {0, 1}
    assert loaded[1]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert random.Random().setstate(loaded[3]) is None


def test_views_aliases_and_parameters_are_saved_as_their_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tree = OrderedDict(whole=whole, again=whole, turned=whole.T, row=whole[1], parameter=torch.nn.Parameter(whole))
    save_tree(tmp_path / "state", tree)
    loaded = load_tree(tmp_path / "state")
    assert all(torch.equal(loaded[name], tree[name]) for name in tree)
    path = tmp_path / "state.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(loaded["parameter"], whole), "no loaded tensor is a view of the file"
    loaded["whole"].zero_()
    assert torch.equal(loaded["again"], whole), "nor of another tensor"


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [1, {2: object()}]}, r"tree\['a'\]\[1\]\[2\] is a object"),
        ({"a": {(1, 2): 3}}, r"tree\['a'\] has the key \(1, 2\)"),
        ([torch.zeros(2, dtype=torch.complex64)], r"tree\[0\] is a Tensor .*complex64"),
        ([torch.zeros(2).to_sparse()], r"tree\[0\] is a Tensor .*sparse"),
        ("\ud800", "half a character"),
    ],
)
def test_what_cannot_be_saved_exactly_is_refused_by_place(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_tree(tmp_path / "state", tree)
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 1', '"format_version": 2', "format version 2 is unknown"),
        ('"format_version": 1', '"format_version": 1, "format_version": 1', "duplicate key 'format_version'"),
        ('"shape": [2]', '"shape": [3]', "not a state tree"),
        ('"tensor": "0"', '"tensor": "9"', "not a state tree"),
        (
            '{"tensor": "0", "dtype": "float32", "shape": [2]}',
            "1",
            "holds tensors that state.json does not name",
        ),
        ("{", "", "bad JSON"),
        ("1", "NaN", "NaN is not JSON"),
    ],
)
def test_a_damaged_state_tree_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    save_tree(tmp_path / "state", [torch.zeros(2)])
    path = tmp_path / "state.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        load_tree(tmp_path / "state")


def test_a_truncated_or_missing_tensor_file_is_refused(tmp_path: Path) -> None:
    save_tree(tmp_path / "state", [torch.zeros(20)])
    path = tmp_path / "state.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"state\.safetensors: cannot be read"):
        load_tree(tmp_path / "state")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"state\.safetensors: cannot be read"):
        load_tree(tmp_path / "state")


# The store


def test_write_leaves_one_sealed_folder_and_names_it(tmp_path: Path) -> None:
    store = store_of(tmp_path / "run")
    assert store.latest() is store.best() is store.newest_complete() is None
    folder = store.write(100, fill)
    assert folder == tmp_path / "run" / "step_000100" == store.latest() == store.newest_complete()
    assert names(store.root) == {"step_000100", "latest"}
    assert (store.root / "latest").read_text() == "step_000100\n"
    manifest = store.verify(folder)
    assert (manifest.step, manifest.score) == (100, None)
    assert set(manifest.files) == {"policy/config.json", "state.json", "state.safetensors"}
    assert load_tree(folder / "state")["value"] == 7


def test_every_flipped_bit_and_every_lost_byte_is_refused_by_name(tmp_path: Path) -> None:
    folder = store_of(tmp_path).write(1, fill, score=0.5)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        good = path.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            for bit in (1, 2, 4, 32):
                damaged = bytearray(good)
                damaged[position] ^= bit
                path.write_bytes(damaged)
                with pytest.raises(CheckpointError, match=path.name):
                    verify(folder)
        for size in (0, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:size])
            with pytest.raises(CheckpointError, match=rf"{path.name}: (truncated|bad JSON|altered)"):
                verify(folder)
        path.write_bytes(good)
        assert verify(folder).score == 0.5


def test_missing_extra_and_special_files_are_refused_by_name(tmp_path: Path) -> None:
    folder = store_of(tmp_path).write(1, fill)
    extra = folder / "policy" / "more.bin"
    extra.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"policy/more\.bin: extra"):
        verify(folder)
    extra.unlink()
    extra.symlink_to(folder / "state.json")
    with pytest.raises(CheckpointError, match=r"policy/more\.bin: is not a plain file"):
        verify(folder)
    extra.unlink()
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json: missing"):
        verify(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read: No such file"):
        verify(folder)
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        verify(tmp_path / "step_000002")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 1', '"format_version": 9', "format version 9 is unknown"),
        ('"step": 1', '"step": 1, "step": 1', "bad JSON: duplicate key 'step'"),
        ('"step": 1', '"step": 2', "altered"),
        ('"score": 0.5', '"score": 0.6', "altered"),
        ('"metric": "score",', "", "altered"),
        ("}", "", "bad JSON"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = store_of(tmp_path).write(1, fill, score=0.5)
    path = folder / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=rf"manifest\.json: {message}"):
        verify(folder)


def test_resume_falls_back_to_the_newest_that_verifies_and_says_why(tmp_path: Path) -> None:
    refused: list[str] = []
    store = store_of(tmp_path, report=refused.append)
    for step in (1, 2, 3):
        store.write(step, fill)
    os.truncate(tmp_path / "step_000003" / "state.safetensors", 5)
    (tmp_path / "step_000002" / "manifest.json").write_text("{}")
    assert store.newest_complete() == tmp_path / "step_000001"
    assert len(refused) == 2
    assert "step_000003/state.safetensors: truncated: 5 bytes" in refused[0]
    assert "step_000002/manifest.json: format version None is unknown" in refused[1]


def test_keeps_the_newest_and_the_best_across_a_resume(tmp_path: Path) -> None:
    scores = {10: 0.1, 20: 0.9, 30: math.nan, 40: 0.4, 50: 0.3}
    for step, score in scores.items():  # a new store each time: nothing is remembered outside the folder
        store_of(tmp_path, keep=2).write(step, fill, score=score)
    assert names(tmp_path) == {"step_000020", "step_000040", "step_000050", "latest", "best"}
    assert (tmp_path / "best").read_text() == "step_000020\n"
    assert store_of(tmp_path).best() == tmp_path / "step_000020"
    assert store_of(tmp_path, mode="min").best() == tmp_path / "step_000050"
    assert store_of(tmp_path, metric="accuracy").best() is None
    store_of(tmp_path, keep=1).write(60, fill, score=0.9)
    assert names(tmp_path) == {"step_000060", "latest", "best"}, "among equals the newer is the best"


def test_every_kth_is_kept_for_ever(tmp_path: Path) -> None:
    for step in range(1, 8):
        store_of(tmp_path, keep=1, keep_every=3).write(step, fill)
    assert names(tmp_path) == {"step_000003", "step_000006", "step_000007", "latest"}


def test_an_unreadable_checkpoint_counts_for_nothing_and_is_left_as_evidence(tmp_path: Path) -> None:
    store = store_of(tmp_path, keep=2)
    store.write(1, fill)
    store.write(2, fill)
    (tmp_path / "step_000002" / "manifest.json").write_text("")
    store.write(3, fill)
    assert names(tmp_path) == {"step_000001", "step_000002", "step_000003", "latest"}


def test_a_run_resumed_from_before_replaces_and_drops_what_it_left(tmp_path: Path) -> None:
    store = store_of(tmp_path, keep=5)
    for step in (1, 2, 3, 4):
        store.write(step, fill)
    store.write(2, lambda folder: fill(folder, 8))
    assert names(tmp_path) == {"step_000001", "step_000002", "latest"}
    assert value_of(store.newest_complete() or tmp_path) == 8


def test_an_error_while_filling_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.write(1, fill)

    def broken(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("no gradient")

    with pytest.raises(RuntimeError, match="no gradient"):
        store.write(2, broken)
    assert names(tmp_path) == {"step_000001", "latest"}


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_best": -1}, {"keep_every": -1}, {"mode": "most"}])
def test_options_out_of_range_are_refused_by_name(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} is {next(iter(options.values()))!r}"):
        store_of(tmp_path, **options)


# Crashes


def in_a_child(work: Callable[[], None]) -> int:
    """Run in a forked process and return its wait status; it never returns into pytest."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_9_in_the_middle_of_filling_leaves_the_one_before(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.write(1, fill)

    def half(folder: Path) -> None:
        fill(folder)
        die()

    status = in_a_child(lambda: store.write(2, half) and None)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert any(name.startswith(".tmp-step_000002-") for name in names(tmp_path))
    assert store.latest() == store.newest_complete() == tmp_path / "step_000001"
    assert names(tmp_path) == {"step_000001", "latest"}, "what the dead run left is cleared up"


def test_kill_9_between_any_two_file_operations_never_loses_a_checkpoint(tmp_path: Path) -> None:
    """Replacing step 2 of {1, 2, 3}, killed before its nth file operation, for every n."""
    base = tmp_path / "base"
    for step in (1, 2, 3):
        store_of(base).write(step, fill)
    outcomes = []
    for n in range(10_000):
        root = tmp_path / "run"
        shutil.copytree(base, root)

        def work(n: int = n, root: Path = root) -> None:
            count = 0

            def before(event: str, _: Any) -> None:
                nonlocal count
                if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                    count += 1
                    if count > n:
                        die()

            sys.addaudithook(before)
            store_of(root, keep=2).write(2, lambda folder: fill(folder, 8))

        status = in_a_child(work)
        for path in root.glob("step_*"):
            verify(path)  # nothing partial ever bears a checkpoint's name
        newest = store_of(root).newest_complete()
        assert newest is not None
        outcomes.append((newest.name, value_of(newest)))
        assert not [name for name in names(root) if name.startswith(".")]
        assert store_of(root).latest() is not None
        shutil.rmtree(root)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(outcomes) > 20
    assert set(outcomes) == {("step_000003", 7), ("step_000002", 7), ("step_000002", 8)}
    assert outcomes[-1] == ("step_000002", 8)
    order = [("step_000003", 7), ("step_000002", 7), ("step_000002", 8)]
    assert [order.index(o) for o in outcomes] == sorted(order.index(o) for o in outcomes)


def test_what_another_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    theirs = tmp_path / f".tmp-step_000005-{os.getppid()}"
    ours = tmp_path / f".tmp-step_000005-{os.getpid()}"
    theirs.mkdir()
    ours.mkdir()
    store.write(1, fill)
    assert theirs.is_dir()
    assert not ours.exists()


def test_a_full_disk_is_one_clean_error_and_nothing_half_written(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.write(1, fill)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        writers = [
            lambda folder: save_tree(folder / "big", torch.zeros(1 << 16)),
            lambda folder: (folder / "big").write_bytes(bytes(1 << 17)),
        ]
        for writer in writers:
            with pytest.raises(CheckpointError, match=r"step_000002: could not be written: .*File too large"):
                store.write(2, writer)

    assert in_a_child(work) == 0
    assert names(tmp_path) == {"step_000001", "latest"}
    assert store.newest_complete() == tmp_path / "step_000001"


def test_two_processes_never_share_a_folder(tmp_path: Path, repository: Path) -> None:
    code = (
        "import sys; from rlhf_ray.rundir.lock import RunLock; lock = RunLock(sys.argv[1]); "
        "print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=repository) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"in use by another run .*\"pid\": {child.pid}, \"host\": "):
            RunLock(tmp_path)
        child.kill()
    with RunLock(tmp_path), pytest.raises(ValueError, match=f'"pid": {os.getpid()}'):
        RunLock(tmp_path)
    RunLock(tmp_path).release()


# The mirror


def mirrors(tmp_path: Path) -> list[Mirror]:
    (tmp_path / "bucket").mkdir()
    local = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    return [
        Mirror(local, "runs/a"),
        Mirror.open(f"file://{tmp_path}/other"),
        Mirror(_MockFileSystem(), "runs/a"),
    ]


def test_a_mirror_follows_the_store_and_gives_checkpoints_back(tmp_path: Path) -> None:
    for i, mirror in enumerate(mirrors(tmp_path)):
        root = tmp_path / f"run{i}"
        store = store_of(root, keep=2, mirror=mirror)
        for step in (1, 2, 3):
            store.write(step, lambda folder, step=step: fill(folder, step))
        store.close()
        assert mirror.names() == ["step_000002", "step_000003"]
        assert mirror.read("latest") == b"step_000003\n"
        shutil.rmtree(root)
        store = store_of(root, keep=2, mirror=mirror)
        back = store.newest_complete()
        assert back == root / "step_000003"
        assert value_of(back) == 3
        os.truncate(back / "state.json", 1)
        assert value_of(store.newest_complete() or root) == 3, "a damaged local one is fetched again"
        store.write(3, lambda folder: fill(folder, 9))
        store.close()
        mirror.pull("step_000003", tmp_path / f"pulled{i}")
        assert value_of(tmp_path / f"pulled{i}") == 9


def test_a_damaged_mirrored_checkpoint_is_refused_and_the_one_before_taken(tmp_path: Path) -> None:
    mirror = Mirror.open(str(tmp_path / "remote"))
    refused: list[str] = []
    store = store_of(tmp_path / "run", mirror=mirror, report=refused.append)
    store.write(1, fill)
    store.write(2, fill)
    store.close()
    (tmp_path / "remote" / "step_000002" / "state.safetensors").unlink()
    shutil.rmtree(store.root)
    assert store.newest_complete() == store.root / "step_000001"
    assert names(store.root) == {"step_000001"}
    assert "state.safetensors: missing" in refused[0]
