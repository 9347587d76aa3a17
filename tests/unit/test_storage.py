"""The mirror of a run: on a real S3 server and in a folder, slow, out of reach, and as all that is left of a run."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from moto.server import ThreadedMotoServer
from pyarrow.fs import LocalFileSystem, S3FileSystem
from small_folders import make_policy
from worlds import chats_config, make_world, ppo_config, write_chats

from rlhf_ray import app, stages
from rlhf_ray.checkpoint import CheckpointError, CheckpointStore, save_tree, verify
from rlhf_ray.config.secrets import redacted
from rlhf_ray.run import read_metrics
from rlhf_ray.rundir.lock import RunLock
from rlhf_ray.storage import Mirror


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A URI in a bucket of a real server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        server.start()
        address = "{}:{}".format(*server.get_host_and_port())
        arguments = {"endpoint_override": address, "scheme": "http", "region": "us-east-1"}
        S3FileSystem(**arguments, allow_bucket_creation=True).create_dir("bucket")
        yield "s3://bucket/runs?" + "&".join(f"{name}={value}" for name, value in arguments.items())
        server.stop()


def fill(folder: Path, value: int = 7) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "config.json").write_text(json.dumps({"value": value}))
    save_tree(folder / "state", {"weights": torch.full((9,), float(value))})


def measured(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def test_a_mirror_on_s3_keeps_what_the_run_keeps_and_gives_it_back(s3: str, tmp_path: Path) -> None:
    mirror = Mirror.open(s3, "ppo", "kept")
    folder = tmp_path / "run"
    store = CheckpointStore(folder, keep=1, keep_every=3, mirror=mirror)
    for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], start=1):
        store.write(step, lambda folder, step=step: fill(folder, step), score=score)
    store.close()
    kept = [f"step_00000{step}" for step in (2, 3, 6, 8)]  # the best, every third, the newest
    assert sorted(path.name for path in folder.glob("step_*")) == mirror.names() == kept
    assert (mirror.read("latest"), mirror.read("best")) == (b"step_000008\n", b"step_000002\n")
    shutil.rmtree(folder)
    store = CheckpointStore(folder, keep=1, keep_every=3, mirror=mirror)
    assert store.newest_complete() == folder / "step_000008"
    assert store.best() == folder / "step_000002"
    store.write(9, fill, score=0.0)
    store.close()
    assert mirror.names() == ["step_000002", "step_000003", "step_000006", "step_000009"], "3 and 6 only it has"
    mirror.pull("step_000009", tmp_path)
    assert json.loads((tmp_path / "policy" / "config.json").read_text()) == {"value": 7}
    verify(tmp_path / "run" / "step_000009")


def test_a_ppo_run_goes_on_from_its_mirror_when_the_machine_is_lost(s3: str, tmp_path: Path) -> None:
    make_world(tmp_path)
    changes: dict[str, Any] = {"total_steps": 4, "keep": 9, "max_staleness": 1, "kl": {"adaptive": True}}
    whole, moved = (ppo_config(tmp_path, run=name, **changes) for name in ("whole", "moved"))
    moved = moved.model_copy(update={"mirror": s3})
    app.train_ppo(whole)
    folder = app.train_ppo(moved)
    assert s3 not in (folder / "config.yaml").read_text() + (folder / "log.txt").read_text()
    mirror = Mirror.open(s3, "ppo", "moved")
    assert mirror.names() == [f"step_00000{step}" for step in (1, 2, 3, 4)]
    assert mirror.read("metrics.jsonl") == (folder / "metrics.jsonl").read_bytes()
    for step in (3, 4):
        mirror.remove(f"step_00000{step}")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="seed: 0 -> 3"):
        app.train_ppo(moved.model_copy(update={"seed": 3}))
    with pytest.raises(ValueError, match="already holds a run"):
        app.train_ppo(moved.model_copy(update={"resume": False}))
    app.train_ppo(moved)
    assert "step_000002" in (folder / "log.txt").read_text()
    assert measured(folder) == measured(app.run_folder(whole))
    assert [row["step"] for row in measured(folder)] == [1, 2, 3, 4]
    name = "step_000004/model.safetensors"
    assert (folder / name).read_bytes() == (app.run_folder(whole) / name).read_bytes()
    app.train_ppo(moved.model_copy(update={"overwrite": True, "total_steps": 1}))
    assert mirror.names() == ["step_000001"]


def test_a_stage_goes_on_from_its_mirror_too(tmp_path: Path) -> None:
    make_policy(tmp_path / "policy")
    write_chats(tmp_path, 20)
    config = chats_config(
        tmp_path,
        packing=True,
        cache=None,
        max_steps=4,
        save_every=1,
        log_every=1,
        keep=1,
        keep_every=2,
        mirror=str(tmp_path / "mirror"),
    )
    folder = stages.sft(config).parent
    with RunLock(folder), pytest.raises(ValueError, match="default is in use by another run"):
        stages.sft(config.model_copy(update={"max_steps": 5}))
    before = (folder / "step_000004" / "model.safetensors").read_bytes(), measured(folder)
    mirror = Mirror.open(str(tmp_path / "mirror"), "sft", "default")
    assert {"step_000002", "step_000004"} <= set(mirror.names())
    mirror.remove("step_000004")
    mirror.remove("step_000003")
    shutil.rmtree(folder)
    stages.sft(config)
    assert ((folder / "step_000004" / "model.safetensors").read_bytes(), measured(folder)) == before
    assert str(tmp_path / "mirror") not in (folder / "config.yaml").read_text()
    shutil.rmtree(folder)
    write_chats(tmp_path, 1)
    with pytest.raises(ValueError, match="the data or the model that this run began with has changed"):
        stages.sft(config)


class Gated(Mirror):
    """A mirror as slow as the test wants."""

    def __init__(self, base: Path) -> None:
        super().__init__(LocalFileSystem(), str(base))
        base.mkdir()
        self.gate = threading.Event()

    def push(self, folder: Path) -> None:
        self.gate.wait()
        super().push(folder)


def test_a_slow_mirror_holds_up_the_checkpoint_after_next_and_nothing_else(tmp_path: Path) -> None:
    mirror = Gated(tmp_path / "slow")
    store = CheckpointStore(tmp_path / "run", keep=1, mirror=mirror)
    store.write(1, fill)  # returns while nothing is uploaded yet
    assert store.latest() == tmp_path / "run" / "step_000001"
    assert mirror.names() == []
    filled = threading.Event()
    second = threading.Thread(target=lambda: store.write(2, lambda folder: (fill(folder, 8), filled.set())))
    second.start()
    assert filled.wait(60), "the next one is written beside the upload"
    assert store.latest() == tmp_path / "run" / "step_000001", "and takes its place when that is done"
    mirror.gate.set()
    second.join()
    store.close()
    assert mirror.names() == ["step_000002"]
    verify(tmp_path / "slow" / "step_000002")


def test_a_mirror_that_fails_is_told_of_made_up_for_and_an_error_only_at_the_end(tmp_path: Path) -> None:
    said: list[str] = []
    mirror = Mirror.open(str(tmp_path / "mirror"))
    store = CheckpointStore(tmp_path / "run", keep=9, mirror=mirror, report=said.append)
    shutil.rmtree(tmp_path / "mirror")
    (tmp_path / "mirror").write_text("a file where the folder was")
    store.write(1, fill)
    store.write(2, fill)
    with pytest.raises(
        CheckpointError, match=r"mirror .* is behind: .*; the checkpoints in .*run are intact; the same"
    ):
        store.close()
    assert len(said) == 2 and "is behind" in said[0] and "intact, and the run goes on" in said[0]
    assert verify(tmp_path / "run" / "step_000002").step == 2
    (tmp_path / "mirror").unlink()
    (tmp_path / "mirror").mkdir()
    store = CheckpointStore(tmp_path / "run", keep=9, mirror=mirror)
    store.write(3, fill)
    store.close()
    assert mirror.names() == ["step_000001", "step_000002", "step_000003"]


def test_half_an_upload_is_no_checkpoint(tmp_path: Path) -> None:
    mirror = Mirror.open(str(tmp_path / "mirror"))
    store = CheckpointStore(tmp_path / "run", keep=9, mirror=mirror, report=[].append)
    store.write(1, fill)
    store.write(2, fill)
    store.close()
    (tmp_path / "mirror" / "step_000002" / "manifest.json").unlink()  # which is uploaded last
    shutil.rmtree(tmp_path / "run")
    assert store.newest_complete() == tmp_path / "run" / "step_000001"


def test_a_mirror_that_nobody_answers_for_stops_the_run_before_it_begins(s3: str, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        uri = f"s3://bucket/runs?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
        make_world(tmp_path)
        with pytest.raises(ValueError, match=r"mirror s3://bucket/runs/ppo/default can't be written: .*credentials"):
            app.train_ppo(ppo_config(tmp_path, mirror=uri))
    assert not (tmp_path / "checkpoints" / "ppo" / "default" / "config.yaml").exists()
    with pytest.raises(ValueError, match=r"mirror s3://nobody/runs can't be written"):
        Mirror.open(s3.replace("bucket", "nobody"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA123:hunter2@bucket/path",
        "s3://AKIA123:hun/ter2@bucket/path",
        "s3://bucket/path?access_key=AKIA123&secret_key=hunter2",
        "gs://hunter2@bucket/path",
        "gs://bucket?access_token=hunter2",
        "s3a://AKIA123:hun/ter2@bucket/path",
    ],
)
def test_credentials_in_a_mirror_are_refused_and_never_repeated(uri: str) -> None:
    with pytest.raises(ValueError, match=r"credentials are the environment's \(AWS_ACCESS_KEY_ID|give s3://") as caught:
        Mirror.open(uri)
    assert not any(secret in str(caught.value) for secret in ("hunter2", "ter2", "AKIA"))


def test_a_mirror_without_a_known_scheme_is_refused() -> None:
    for uri in ("ftq://x/y", "checkpoints", "file://host/x", "hdfs://x/y"):
        with pytest.raises(ValueError, match=f"mirror is '{uri}'; give s3://"):
            Mirror.open(uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:80/score", "http://***@host:80/score"),
        ("https://host/score?token=hunter2&n=3", "https://host/score?token=***&n=3"),
        ("https://host/score?n=3&X-Amz-Signature=a%2Fb#x", "https://host/score?n=3&X-Amz-Signature=***#x"),
        ("path/to/file.py:function", "path/to/file.py:function"),
        ("asked http://a:b@c and http://d:e@f", "asked http://***@c and http://***@f"),
    ],
)
def test_secrets_in_urls_are_not_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown
