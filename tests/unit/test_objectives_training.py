"""The training loop in this process: batches, resuming bit for bit, completion, and what it refuses."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_folders import make_policy
from torch import Tensor, nn
from worlds import chats_config, write_chats

from rlhf_ray import cli, stages
from rlhf_ray.checkpoint import CheckpointError
from rlhf_ray.config import Optimiser, SFTConfig, load
from rlhf_ray.config.presets import hardware_preset, preset_file
from rlhf_ray.objectives.sft import SFT
from rlhf_ray.ops.schedules import cosine
from rlhf_ray.run import read_metrics
from rlhf_ray.runtime import train as runtime
from rlhf_ray.runtime.train_batches import BatchOrder
from rlhf_ray.runtime.train_loop import TrainLoop
from rlhf_ray.runtime.train_optimiser import apply_gradients, learning_rate, make_optimiser
from rlhf_ray.runtime.train_window import Window


@pytest.fixture
def config(tmp_path: Path) -> SFTConfig:
    make_policy(tmp_path / "policy")
    write_chats(tmp_path, 40)
    return chats_config(
        tmp_path,
        dropout=0.1,
        micro_batch_size=4,
        max_steps=8,
        save_every=2,
        log_every=1,
        # A bias of attention's keys has no gradient but rounding errors, which a smaller eps would blow up.
        optimiser=Optimiser(lr=1e-2, eps=1e-5),
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run_folder(config: SFTConfig) -> Path:
    return config.checkpoints / "sft" / config.run


def interrupt_at(config: SFTConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until SIGTERM arrives in the middle of that step."""
    real = TrainLoop.train_step

    def with_signal(loop: TrainLoop, should_stop: Callable[[], bool]) -> bool:
        if loop.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loop, should_stop)

    monkeypatch.setattr(TrainLoop, "train_step", with_signal)
    with pytest.raises(runtime.Interrupted, match="run the same command again"):
        stages.sft(config)
    monkeypatch.undo()


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(
    config: SFTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = stages.sft(config.model_copy(update={"run": "whole"}))
    interrupt_at(config, 5, monkeypatch)
    assert (run_folder(config) / "latest").read_text().strip() == "step_000005"
    assert not stages.complete(config)
    resumed = stages.sft(config)
    assert resumed.name == undisturbed.name
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())

    def losses(folder: Path) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_metrics(folder) if "loss" in row}

    assert losses(run_folder(config)) == losses(run_folder(config).with_name("whole"))
    assert sorted(losses(run_folder(config))) == list(range(1, 9))


def test_a_stopped_run_goes_on_with_the_means_of_its_metrics(
    config: SFTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.model_copy(update={"log_every": 4})
    stages.sft(config.model_copy(update={"run": "whole"}))
    interrupt_at(config, 3, monkeypatch)
    stages.sft(config)
    for name in ("loss", "grad_norm", "tokens"):
        found, expected = (
            [row[name] for row in read_metrics(folder) if name in row]
            for folder in (run_folder(config), run_folder(config).with_name("whole"))
        )
        assert found == expected and len(found) == 2


def test_steps_go_on_while_a_checkpoint_is_written(config: SFTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    early = stages.sft(config.model_copy(update={"run": "whole", "keep": 9})).with_name("step_000002")
    third_step, real_step, real_save = threading.Event(), TrainLoop.train_step, SFT.save

    def train_step(loop: TrainLoop, should_stop: Callable[[], bool]) -> bool:
        stop = real_step(loop, should_stop)
        if loop.step == 3:
            third_step.set()
        return stop

    def save(objective: SFT, model: nn.Module, folder: Path) -> None:
        assert third_step.wait(60), "the second step's checkpoint is written before the third step ends"
        real_save(objective, model, folder)

    monkeypatch.setattr(TrainLoop, "train_step", train_step)
    monkeypatch.setattr(SFT, "save", save)
    found = stages.sft(config.model_copy(update={"keep": 9})).with_name("step_000002")
    for name in ("model.safetensors", "trainer/optimiser.safetensors", "trainer/state.json"):
        assert (found / name).read_bytes() == (early / name).read_bytes()
    assert any(row.get("time/save", 0.0) > 0.0 for row in read_metrics(run_folder(config)))


def test_a_checkpoint_that_can_not_be_written_ends_the_run_and_those_before_it_are_intact(
    config: SFTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SFT.save

    def full_disk(objective: SFT, model: nn.Module, folder: Path) -> None:
        real(objective, model, folder)
        if "step_000004" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SFT, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"step_000004: could not be written: .*No space left"):
        stages.sft(config)
    assert [path.name for path in run_folder(config).glob("*step_*")] == ["step_000002"]
    monkeypatch.undo()
    assert stages.sft(config).parent == run_folder(config) and stages.complete(config)


def test_a_complete_run_is_not_run_again(
    config: SFTConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stages.sft(config)
    assert stages.complete(config)
    monkeypatch.setattr(runtime, "work", lambda *args: pytest.fail("trained again"))
    capsys.readouterr()
    assert stages.sft(config) == folder
    said = capsys.readouterr().out
    assert "complete already, 8 steps" in said and "held-out perplexity" in said


def test_only_newest_and_best_checkpoints_are_kept(config: SFTConfig) -> None:
    best = stages.sft(config.model_copy(update={"keep": 1}))
    folder = run_folder(config)
    kept = {path.name for path in folder.glob("step_*")}
    assert kept == {best.name, "step_000008"}
    scores = {row["step"]: row["eval/loss"] for row in read_metrics(folder) if "eval/loss" in row}
    saved = {step: loss for step, loss in scores.items() if step}
    assert sorted(saved) == [2, 4, 6, 8] and best.name == f"step_{min(saved, key=saved.__getitem__):06d}"
    assert saved[8] < scores[0]


def test_micro_batch_size_does_not_change_the_result(config: SFTConfig) -> None:
    calm = config.model_copy(update={"dropout": 0.0})
    first = weights(stages.sft(calm.model_copy(update={"run": "a", "micro_batch_size": 1})))
    second = weights(stages.sft(calm.model_copy(update={"run": "b", "micro_batch_size": 6})))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-5, rtol=1e-5)


def test_changed_data_is_not_trained_on_silently(config: SFTConfig) -> None:
    stages.sft(config)
    with config.data[0].open("a", encoding="utf-8") as file:
        file.write('{"prompt": "more", "response": "less"}\n')
    assert not stages.complete(config)
    with pytest.raises(ValueError, match="has changed; pass --overwrite"):
        stages.sft(config)
    assert stages.sft(config.model_copy(update={"overwrite": True})).name == "step_000008"
    assert stages.complete(config)


def test_a_diverging_run_says_what_to_do(config: SFTConfig) -> None:
    wild = config.model_copy(update={"optimiser": Optimiser(lr=1e30, max_grad_norm=0.0)})
    with pytest.raises(ValueError, match=r"not both finite; lower optimiser\.lr"):
        stages.sft(wild)


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"prompt": 3}\n', "chats.jsonl:1: "), ("", "the file is empty"), (None, "no such file")],
)
def test_bad_data_leaves_nothing_behind(config: SFTConfig, content: str | None, reason: str) -> None:
    if content is None:
        config.data[0].unlink()
    else:
        config.data[0].write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        stages.sft(config)
    assert not run_folder(config).exists()


def test_batches_visit_every_row_once_an_epoch() -> None:
    order = BatchOrder(rows=10, batch_size=4, seed=3)
    rows = [row for step in range(1, 6) for row in order.rows_of(step)]  # two epochs
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]
    assert BatchOrder(rows=10, batch_size=4, seed=3).rows_of(4) == order.rows_of(4)
    assert BatchOrder(rows=10, batch_size=4, seed=4).rows_of(1) != order.rows_of(1)
    assert BatchOrder(rows=3, batch_size=8, seed=0).rows_of(1)[:3] != [0, 0, 0]


def test_length_of_a_run() -> None:
    order = BatchOrder(rows=10, batch_size=4, seed=0)
    assert order.total_steps(epochs=1, max_steps=0) == 3
    assert order.total_steps(epochs=2.4, max_steps=0) == 6
    assert order.total_steps(epochs=1, max_steps=7) == 7
    assert order.epoch(5) == 2.0


def test_only_matrices_decay() -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(4, 2), "wpe": nn.Embedding(4, 2), "c_fc": nn.Linear(2, 2)})
    decayed, others = make_optimiser(model, Optimiser(weight_decay=0.3)).param_groups
    assert {id(p) for p in decayed["params"]} == {id(model["wte"].weight), id(model["c_fc"].weight)}
    assert {id(p) for p in others["params"]} == {id(model["wpe"].weight), id(model["c_fc"].bias)}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    model, window = nn.Linear(2, 1), Window()
    optimiser = make_optimiser(model, Optimiser())
    for loss, scale in ((1.0, 1.0), (2.0, math.nan), (math.inf, 1.0)):
        before = model.weight.detach().clone()
        (model(torch.ones(1, 2)).sum() * scale).backward()
        norm = apply_gradients(optimiser, torch.tensor(loss), lr=0.1, max_grad_norm=1.0)
        window.add(torch.tensor(loss), norm, tokens=1, seconds=1.0, waited=0.0)
        assert torch.equal(before, model.weight) == (not math.isfinite(loss * scale)) and model.weight.grad is None
    assert window.skipped_at_last(2) and not window.skipped_at_last(3)
    metrics = window.take()
    assert (metrics["loss"], metrics["update/skipped"]) == (1.0, 2.0)


def test_learning_rate_follows_the_schedule() -> None:
    settings = Optimiser(lr=2.0, schedule="cosine", warmup_fraction=0.03)
    rates = [learning_rate(settings, step=step, total=100) for step in range(1, 101)]
    assert rates == [2.0 * cosine(step, 100, 0.03) for step in range(100)]
    assert rates[0] == pytest.approx(0.5) and max(rates) == 2.0 and rates[-1] < 0.01


def test_command_line_turns_errors_into_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = cli.main(SFTConfig, "", None, stages.sft, ["--policy", str(tmp_path / "none"), "--device", "cpu"])
    captured = capsys.readouterr()
    assert code == 2 and captured.err.startswith("error: policy = ") and captured.err.count("\n") == 1


def test_command_line_names_the_preset_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[SFTConfig] = []
    assert cli.main(SFTConfig, "", "sft", seen.append, ["--run", "x"]) == 0
    preset = preset_file("sft", hardware_preset())
    assert f"configs/sft/{preset.name}" in capsys.readouterr().out
    assert seen[0] == load(SFTConfig, ["--run", "x"], preset=preset)


def test_a_stopped_run_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(config: SFTConfig) -> None:
        raise runtime.Interrupted("stopped and saved")

    assert cli.main(SFTConfig, "", None, stopped, []) == 130
    assert "stopped and saved" in capsys.readouterr().err
