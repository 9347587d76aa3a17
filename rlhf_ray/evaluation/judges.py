"""Who rates a response and has no part in training: the demo world's rules, or the user's own function.

A judge gives a number for a prompt row and a response; more is better, and only the order within a prompt and
the mean are used.  A new judge is one function and one line in JUDGES.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rlhf_ray.data.rows import PromptRow
from rlhf_ray.evaluation import demo_judge
from rlhf_ray.functions import load_function
from rlhf_ray.rewards.function import call_fields

Judge = Callable[[PromptRow, str], float]


def _demo(row: PromptRow, response: str) -> float:
    return float(demo_judge.judge(row.prompt, response).score)


JUDGES: dict[str, Judge | None] = {"demo": _demo, "none": None}


def find_judge(name: str) -> Judge | None:
    """The judge of a name, or the function of ``path/to/file.py:function``; None for no judge.

    The function is called as ``function(prompt=..., response=..., messages=..., **fields)``.  Raises
    ValueError when there is no such judge; the judge raises it when the function returns no finite number.
    """
    if name in JUDGES:
        return JUDGES[name]
    if ".py:" not in name:
        raise ValueError(f"judge = {name!r}; choose {', '.join(JUDGES)} or path/to/file.py:function")
    function = load_function(name, field="judge")

    def user_judge(row: PromptRow, response: str) -> float:
        score = function(response=response, **call_fields(row))
        if not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError(f"judge = {name!r} returned {score!r}; it must return a finite number")
        return float(score)

    return user_judge
