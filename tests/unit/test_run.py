"""A run's folder: what is logged is read back, a resume repeats and loses no step, signals ask to stop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray import console
from rlhf_ray.run import Run, read_metrics

CONFIG: dict[str, Any] = {"seed": 1, "ppo": {"kl_coef": 1e-5, "sizes": (1, 2)}, "name": "é"}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_a_run_writes_what_it_was_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Run.open(tmp_path / "a" / "run", CONFIG, resume=False) as run:
        run.say("writing [here]")
        run.log(1, {"loss": 0.5, "count": 3})
        run.log(2, {"loss": math.nan, "ratio": math.inf, "low": -math.inf})
        run.sync()
        run.samples(2, [{"prompt": "a", "score": 1.5}, {"prompt": "b", "judge": True}])
    folder = run.folder
    assert yaml.safe_load((folder / "config.yaml").read_text()) == CONFIG | {"ppo": {"kl_coef": 1e-5, "sizes": [1, 2]}}
    assert capsys.readouterr().out == "writing [here]\n"
    assert (folder / "log.txt").read_text().endswith(" writing [here]\n")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "loss": 0.5, "count": 3}'
    assert json.loads(lines[1], parse_constant=pytest.fail)["loss"] == "NaN"
    second = read_metrics(folder)[1]
    assert math.isnan(second["loss"]) and (second["ratio"], second["low"]) == (math.inf, -math.inf)
    assert scalars(folder, "loss")[0] == (1, 0.5)
    rows = pyarrow.parquet.read_table(folder / "samples" / "step_000002.parquet").to_pylist()
    assert rows == [
        {"step": 2, "prompt": "a", "score": 1.5, "judge": None},
        {"step": 2, "prompt": "b", "score": None, "judge": True},
    ]
    assert read_metrics(tmp_path) == []


def test_a_resumed_run_repeats_no_step_and_loses_none(tmp_path: Path) -> None:
    with Run.open(tmp_path, CONFIG, resume=False) as run:
        for step in (1, 2, 3, 4):
            run.log(step, {"loss": float(step)})
            run.samples(step, [{"prompt": "a"}])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    with Run.open(tmp_path, CONFIG, resume=True) as run:
        run.resume_at(2)
        for step in (3, 4, 5):
            run.log(step, {"loss": float(10 * step)})
            run.samples(step, [{"prompt": "b"}])
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == expected
    assert scalars(tmp_path, "loss") == expected
    tables = [pyarrow.parquet.read_table(path) for path in sorted((tmp_path / "samples").iterdir())]
    assert [table["prompt"].to_pylist() for table in tables] == [["a"], ["a"], ["b"], ["b"], ["b"]]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    with Run.open(tmp_path, CONFIG, resume=True) as run:
        run.log(1, {"loss": 1.0})
    with Run.open(tmp_path, CONFIG, resume=True) as run:
        run.resume_at(0)
    assert read_metrics(tmp_path) == []


def test_an_unfinished_line_is_gone_after_a_resume_without_a_step(tmp_path: Path) -> None:
    Run.open(tmp_path, CONFIG, resume=False).close()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0')
    with Run.open(tmp_path, CONFIG, resume=True) as run:
        run.log(2, {})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ['{"step": 1, "step": 2}', "[1]", '{"loss": 1}', "{", "\udcff"])
def test_a_bad_line_of_metrics_is_named(tmp_path: Path, line: str) -> None:
    text = '{"step": 0}\n' + line + '\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_another_configuration_stops_a_resume_and_shows_each_field(tmp_path: Path) -> None:
    Run.open(tmp_path, CONFIG, resume=False).close()
    changed = {"seed": True, "ppo": {"kl_coef": 0.1, "sizes": [1, 2], "gamma": 1.0}}
    with pytest.raises(ValueError, match="allow-config-change") as caught:
        Run.open(tmp_path, changed, resume=True)
    assert str(caught.value).splitlines()[1:-1] == [
        "  name: 'é' -> (absent)",
        "  ppo.gamma: (absent) -> 1.0",
        "  ppo.kl_coef: 1e-05 -> 0.1",
        "  seed: 1 -> True",
    ]
    Run.open(tmp_path, CONFIG, resume=True).close()  # the refusal changed nothing and let the folder go
    Run.open(tmp_path, changed, resume=True, allow_config_change=True).close()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == changed
    assert "configuration changed: seed: 1 -> True" in (tmp_path / "log.txt").read_text()


def test_a_folder_that_is_taken_or_no_folder_is_refused(tmp_path: Path) -> None:
    with (
        Run.open(tmp_path, CONFIG, resume=False),
        pytest.raises(ValueError, match=f'in use by another run .*"pid": {os.getpid()}'),
    ):
        Run.open(tmp_path, CONFIG, resume=True)
    with pytest.raises(ValueError, match="already holds a run; resume it"):
        Run.open(tmp_path, CONFIG, resume=False)
    with pytest.raises(ValueError, match=r"config\.yaml/run can't be made: Not a dir"):
        Run.open(tmp_path / "config.yaml" / "run", CONFIG, resume=False)


def test_timers_add_up_and_belong_to_one_line(tmp_path: Path) -> None:
    with Run.open(tmp_path, CONFIG, resume=False) as run:
        for _ in range(2):
            with run.time("generate"):
                pass
        with pytest.raises(RuntimeError), run.time("update"):
            raise RuntimeError
        run.log(1, {"loss": 1.0})
        run.log(2, {"loss": 1.0})
    first, second = read_metrics(tmp_path)
    assert set(first) == {"step", "loss", "time/generate", "time/update"}
    assert first["time/generate"] > 0
    assert set(second) == {"step", "loss"}


def test_signals_ask_to_stop_and_the_third_interrupt_insists(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Run.open(tmp_path, CONFIG, resume=False) as run:
        run.install_signal_handlers()
        assert not run.should_stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.should_stop
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    told = capfd.readouterr().err
    assert told.count("stopping: this step is finished and saved first") == 1
    assert told.count("still saving") == 3


def test_opening_a_run_imports_neither_ray_nor_tensorboard(repository: Path) -> None:
    code = "import sys, rlhf_ray.run; print(*{'ray', 'tensorboard'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    assert done.stdout == "\n"


# The console


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is not a terminal."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is taken for a terminal of 80 columns."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


ROWS = [("[red]SFT", 0.512345678, 12), ("PPO", 10.0, 3)]


@pytest.mark.usefixtures("plain")
def test_plain_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("Before and after", ["model", "win-rate", "n"], ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "Before and after",
        "model     win-rate   n",
        "--------  --------  --",
        "[red]SFT    0.5123  12",
        "PPO             10   3",
    ]
    console.table("Nothing", ["model"], [])
    assert capsys.readouterr().out == "Nothing\nmodel\n-----\n"


@pytest.mark.usefixtures("terminal")
def test_tables_on_a_terminal_show_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("[a] title", ["model", "win-rate", "n"], ROWS)
    out = capsys.readouterr().out
    assert all(cell in out for cell in ("[a] title", "[red]SFT", "0.5123", "12", "PPO", "10"))


@pytest.mark.usefixtures("plain")
def test_plain_progress_is_the_first_the_due_and_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("sft", 100, every_seconds=3600) as progress:
        for step in range(1, 51):
            progress.update(step, {"loss": 1 / step})
    assert capsys.readouterr().out == "sft 1/100  loss 1\nsft 50/100  loss 0.02\n"
    with console.Progress("sft", 2, every_seconds=0) as progress:
        progress.update(1)
        progress.update(2)
    assert capsys.readouterr().out == "sft 1/2\nsft 2/2\n"


@pytest.mark.usefixtures("terminal")
def test_the_live_bar_shows_steps_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("ppo", 10, start=3) as progress:
        progress.update(4, {"kl": 0.25})
        console.say("a note [above] the bar")
    out = capsys.readouterr().out
    assert "4/10" in out and "kl 0.25" in out and "a note [above] the bar" in out


def test_errors_are_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    console.error("no data\nat all")
    assert capsys.readouterr() == ("", "error: no data at all\n")
