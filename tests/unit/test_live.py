"""The view of a run on a terminal, as lines, and as JSON."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from rlhf_ray import console
from rlhf_ray.live import RunView, clock, sparkline

STEP = {
    "objective/scores": 0.5,
    "objective/kl": 1.25,
    "objective/entropy": 2.0,
    "response_length/mean": 31.0,
    "objective/eos_rate": 1.0,
    "time/step": 4.0,
    "time/generate": 1.0,
    "time/judge": 0.5,
    "time/learn": 2.0,
    **{f"perf/tokens_per_second/{role}": 1234.0 for role in ("generator", "reward", "reference", "learner")},
}


def sample() -> tuple[str, str]:
    return "<|user|>where is\nthe cat?", "on [the] mat"


def test_small_lines_of_numbers_and_clocks() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([3, 3]) == "▁▁" and sparkline([]) == ""
    assert sparkline([0, math.nan, math.inf, 7]) == "▁  █"
    assert clock(7) == "0:07" and clock(127.4) == "2:07" and clock(3727) == "1:02:07"


def test_a_terminal_sees_phases_speeds_trends_and_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, height=40, color_system=None)
    monkeypatch.setattr(console, "_console", screen)
    with RunView("ppo/mine", 10, start=0) as view:
        view.update(1, STEP, sample)
        view.update(2, {**STEP, "objective/scores": 0.75}, sample)
        console.say("a line above the view")
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for shown in (
        "ppo/mine  step 2 of 10",
        "4 s a step, 0:32 left",
        "2.00 s  50%  learner 1,234 tok/s",
        "0.75  ▁█",
        "<|user|>where is the cat?",
        "on [the] mat",
        "a line above the view",
    ):
        assert shown in text
    assert text.index("a line above the view") < text.rindex("step 2 of 10")


def test_elsewhere_a_line_a_step_and_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    def never() -> tuple[str, str]:
        raise AssertionError("nobody looks at it")

    with RunView("ppo/mine", 10, start=0) as view:
        view.update(1, STEP, never)
    line = "ppo 1/10  score 0.5  kl 1.25  entropy 2  length 31  eos 1  1,234 tok/s  4.0 s  0:36 left\n"
    assert capsys.readouterr().out == line
    try:
        console.show("json")
        with RunView("ppo/mine", 10, start=0) as view:
            console.say("a remark")
            view.update(1, {**STEP, "objective/kl": math.nan}, never)
    finally:
        console.show("live")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"step": 1, **STEP, "objective/kl": "NaN"}
    assert err == "a remark\n"
