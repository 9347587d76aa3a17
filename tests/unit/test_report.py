"""The report of a run: numbers and words from the folder alone, one file without network, nothing that is markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rlhf_ray.config import PPOConfig, SFTConfig
from rlhf_ray.report import write_report
from rlhf_ray.report.answers import turns
from rlhf_ray.report.chart import spread
from rlhf_ray.report.command import main
from rlhf_ray.report.record import read_record
from rlhf_ray.report.series import MOST_POINTS, Series, series
from rlhf_ray.report.summary import verdict
from rlhf_ray.report.text import duration, number, percent
from rlhf_ray.run import write_samples
from rlhf_ray.rundir.machine import write_machine
from rlhf_ray.rundir.metrics import metrics_line

HOSTILE = "<script>alert('x')</script>"
VOID = {"meta", "link", "input", "br", "wbr"}


class Page(HTMLParser):
    """Checks that every element is closed, and keeps what the page refers to and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def ppo_row(step: int, steps: int, gain: float) -> dict[str, float]:
    """Plausible metrics of a step of a run whose reward rises by ``gain``."""
    done = step / steps
    return {
        "objective/scores": gain * done,
        "objective/scores_std": 1.0,
        "objective/rlhf_reward": gain * done - 0.1,
        "objective/kl": 2 * done + (0.0 if step == 1 else 0.01 * math.sin(step)),
        "objective/eos_rate": 0.9 + 0.1 * done,
        "objective/entropy": 1 - 0.5 * done,
        "response_length/mean": 20 - 5 * done,
        "val/explained_variance": math.nan if step == 2 else 1 - 4 / step,
        "policy/clipfrac_avg": 0.1 / step,
        "policy/grad_norm": math.inf if step == 3 else 1.0,
        "time/step": 2.0,
        "time/generate": 0.5,
        "time/learn": 1.4,
        "perf/tokens_per_second/generator": 9000.0,
        "perf/tokens_per_second/learner": 7000.0,
    }


def probe(step: int) -> dict[str, Any]:
    return {
        "prompt": f"<|bos|><|user|>Where is {HOSTILE}?<|assistant|>",
        "response": f"{HOSTILE} here<|eos|>",
        "score": 0.5 * step,
        "kl": 0.1 * step,
        "finished": True,
        "tokens": [HOSTILE, " here", "<|eos|>"],
        "token_kl": [0.0, 0.02 * step, -0.3 * step],
        "token_value": [-1.0, 0.5, 2.0],
        "token_advantage": [0.1, -0.1, 0.0],
    }


def make_run(folder: Path, *, steps: int = 60, gain: float = 1.0, seed: int = 0) -> Path:
    """A folder as a PPO run leaves it."""
    folder.mkdir(parents=True)
    config = PPOConfig(policy="sft/<best>", seed=seed, batch_size=128)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.resolved()), encoding="utf-8")
    lines = [metrics_line(step, ppo_row(step, steps, gain)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "log.txt").write_text("2026-11-21T18:46:44+00:00 ppo: writing\nand more\n", encoding="utf-8")
    for step in (0, 25, steps):
        write_samples(folder / "probes" / f"step_{step:06d}.parquet", step, [probe(step)])
    row = {"prompt": "<|user|>a", "response": HOSTILE, "score": 1.0, "kl": 0.2, "advantage": -0.5}
    write_samples(folder / "samples" / "step_000002.parquet", 2, [{"pick": p, **row} for p in ("best", "worst")])
    numbers = {"judge": 2.0, "kl": 1.0, "eos_rate": 0.9}
    evaluation = {
        "prompts": 256,
        "win_rate": {"rate": 0.826, "low": 0.775, "high": 0.868},
        "baseline": numbers,
        "policy": {**numbers, "judge": 3.25, "eos_rate": 0.915},
        "intervals": {"baseline": {}, "policy": {"judge": [3.11, 3.36]}, "difference": {"judge": [1.13, 1.37]}},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    roles = {"learner": {"predicted": 550_000_000, "measured": 480_000_000}}
    memory = {"budget": 24e9, "predicted": 610_000_000, "chosen": {"ppo.micro_batch_size": 8}, "roles": roles}
    memory["reduced"] = {"learner": {"ppo.micro_batch_size": 4}}
    (folder / "memory.json").write_text(json.dumps(memory), encoding="utf-8")
    write_machine(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    written = write_report([run])
    assert written == run / "report.html"
    return written.read_text(encoding="utf-8")


def test_the_page_is_one_small_file_that_needs_nothing_else(page: str) -> None:
    assert len(page.encode()) < 200_000
    parsed = Page(page)
    assert parsed.references and all(r == "data:," or r.startswith("#") for r in parsed.references)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "prefers-color-scheme:dark" in page and "@media print" in page and "width=device-width" in page


def test_what_comes_from_data_is_text(page: str) -> None:
    assert "<script>alert" not in page
    said = page.count("&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;")
    assert said == 1 + 2 + 2  # the prompt, its answers before and after, two samples
    assert "sft/&lt;best&gt;" in page


def test_it_says_first_whether_the_run_learned(page: str) -> None:
    text = Page(page).text
    assert "The reward rose from 0.017 to 0.96 (standard error of the change 0.095)" in text
    assert "A judge that no training touched prefers its answers on 82.6\N{NO-BREAK SPACE}% of held-out" in text
    assert text.index("The reward rose") < text.index("How it went") < text.index("before and after")
    for fact in (
        "60 steps",
        "2 min 0 s",
        "21 November 2026",
        "3.25 3.11 to 3.36",
        "+1.25 +1.13 to +1.37",
        "+1.50 points",
    ):
        assert fact in text
    assert "learner0.55 GB0.48 GB" in text and "ppo.micro_batch_size = 8; halved" in text
    assert "as memory did not suffice: learner: ppo.micro_batch_size = 4." in text


def test_curves_take_their_colours_from_the_page_and_say_what_they_show(page: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", page)
    assert len(charts) == 12 and all('role="img" aria-label="' in chart for chart in charts)
    assert 'aria-label="Reward: first from 0.017 to 0.96; less the KL penalty' in page  # the run's name is "first"
    assert "var(--line0)" in charts[0] and "var(--grid)" in charts[0]
    assert not re.search(r"#0000[0-9a-f]{2}|font-family|DejaVu", "".join(charts))


def test_tokens_are_coloured_by_kl_and_by_value(page: str) -> None:
    assert 'class="t km3 vp3" data-n="KL −18.0 · value 2.00 · advantage 0.00"><em>eos</em>' in page
    assert ' <span class="t kp3" data-n="KL +1.20 · value 0.50 · advantage −0.10">here</span>' in page
    assert "step 25" not in page  # the first and the last round alone
    assert turns("<|bos|><|system|>Be <b>.<|user|>Hi<|assistant|>") == "<small>system: Be &lt;b&gt;.</small>Hi"


def test_runs_of_one_stage_lie_over_each_other(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_run(tmp_path / "second", gain=2.0, seed=1)
    assert main([str(run), str(other), "--output", str(tmp_path / "both.html")]) == 0
    text = Page((tmp_path / "both.html").read_text(encoding="utf-8")).text
    assert "2 runs over each other" in text and "first, step 60" in text and "second, step 60" in text
    assert re.search(r"How their configurations differfirstsecondseed01", text)
    (other / "config.yaml").write_text(yaml.safe_dump(SFTConfig().resolved()), encoding="utf-8")
    assert main([str(run), str(other)]) == 2
    assert "error: the runs are of different stages: ppo, sft" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err


def test_a_stage_shows_its_losses(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(SFTConfig().resolved()), encoding="utf-8")
    rows = [(0, {"eval/loss": 2.0}), (10, {"loss": 1.1, "time/step": 0.5}), (20, {"loss": 0.6, "time/step": 0.25})]
    rows += [(20, {"eval/loss": 0.5})]
    (tmp_path / "metrics.jsonl").write_text("".join(metrics_line(*row) for row in rows), encoding="utf-8")
    record = read_record(tmp_path)
    assert (record.stage, record.seconds) == ("sft", 7.5)
    assert verdict(record) == "The held-out loss fell from 2.00 to 0.50 nats."
    text = Page(write_report([tmp_path]).read_text(encoding="utf-8")).text
    assert "Supervised fine-tuning" in text and "held out, nats" in text and "doctor" not in text
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(metrics_line(30, {"loss": float("nan"), "update/skipped": 1.0}))
    text = Page(write_report([tmp_path]).read_text(encoding="utf-8")).text
    assert "But the doctor found 2 warnings: see below." in text and "Loss is nan warning, step 30, not_finite" in text


@pytest.mark.parametrize(("gain", "words"), [(0.5, "rose"), (-0.5, "fell"), (0.1, "did not clearly change,")])
def test_a_change_is_one_beyond_three_standard_errors(tmp_path: Path, gain: float, words: str) -> None:
    said = verdict(read_record(make_run(tmp_path / "run", gain=gain)))
    assert said.startswith(f"The reward {words} from {number(gain / 60)} to ")


def test_a_long_history_is_drawn_as_means_that_keep_its_extremes() -> None:
    steps = np.arange(10_000)
    values = np.where(steps == 7777, 50.0, 1.0)
    long = Series(steps=steps, values=values)
    assert len(long.small()) == MOST_POINTS
    assert long.small().values.sum() * 10_000 / MOST_POINTS == pytest.approx(values.sum(), rel=0.01)
    assert long.range()[2].max() == 50
    line = Series(steps=np.arange(100), values=np.arange(100.0))
    assert np.allclose(line.smooth().values[:95], line.values[:95])  # no lag, at the beginning neither
    assert line.smooth().values[-1] == pytest.approx(96.5)  # the mean of the last six
    rows = [{"step": 1, "a": 1.0}, {"step": 2, "a": math.nan}, {"step": 3}, *({"step": 4, "a": a} for a in (2, 3))]
    assert series(rows, "a").values.tolist() == [1.0, 3.0]
    assert len(series([], "a")) == 0


def test_names_at_the_ends_of_lines_keep_apart() -> None:
    places = spread([0.5, 0.98, 0.99, 0.5], gap=0.1)
    assert max(places) <= 1 and places[2] > places[1] > places[3] > places[0]
    assert np.diff(sorted(places)).min() == pytest.approx(0.1)


def test_numbers_are_short() -> None:
    shown = [number(x) for x in (0, 1.096, -0.0312, 12.86, 7056.1, 5e-5, math.nan)]
    assert shown == ["0.00", "1.10", "−0.031", "12.9", "7,056", "5e−5", "not a number"]
    assert number(0.5, signed=True) == "+0.50"
    assert [percent(x) for x in (1.0, 0.984, -0.5)] == [f"{x}\N{NO-BREAK SPACE}%" for x in ("100", "98.4", "−50")]
    assert [duration(x) for x in (59.4, 96, 11100)] == ["59 s", "1 min 36 s", "3 h 5 min"]
