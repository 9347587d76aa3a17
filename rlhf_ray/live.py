"""What a person sees of a PPO run while it goes on.

On a terminal a view that is drawn again at every step: how far the run is, where a step's time goes and how fast each
role is, how the few numbers that tell whether it learns have moved, and the last answer.  Elsewhere, and with
``--show lines``, one line a step; with ``--show json`` one JSON object a step on standard output.

Left out on purpose: keys to press, and whatever metrics.jsonl and the report keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from types import TracebackType

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhf_ray import console
from rlhf_ray.rundir.metrics import metrics_line

PHASES = {
    "generate": ("generator",),
    "judge": ("reward", "reference"),
    "learn": ("learner",),
    "publish": (),
    "save": (),
}
"""A step's phases, and the roles that work in them."""

TRENDS = {
    "score": "objective/scores",
    "kl": "objective/kl",
    "entropy": "objective/entropy",
    "length": "response_length/mean",
    "eos": "objective/eos_rate",
}
"""What is drawn as a line over the last steps."""

BLOCKS = "▁▂▃▄▅▆▇█"
TREND_STEPS = 24
BAR_WIDTH = 24


def sparkline(values: Iterable[float]) -> str:
    """One character a value, the lowest at the bottom, the highest at the top; what is no number is a gap."""
    shown = list(values)
    finite = [value for value in shown if abs(value) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((v - low) * scale)] if abs(v) < float("inf") else " " for v in shown)


def clock(seconds: float) -> str:
    """``2:07`` minutes, or ``1:02:07`` hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class RunView:
    """The view of one run; `update` it with every step's metrics."""

    def __init__(self, name: str, total: int, *, start: int) -> None:
        self.name, self.total, self.step = name, total, start
        self._trends = {label: deque[float](maxlen=TREND_STEPS) for label in TRENDS}
        self._seconds = deque[float](maxlen=20)
        self._metrics: Mapping[str, float] = {}
        self._sample = ("", "")
        terminal = console.live_terminal()
        self._live = Live(console=terminal, auto_refresh=False, vertical_overflow="crop") if terminal else None

    def update(self, step: int, metrics: Mapping[str, float], sample: Callable[[], tuple[str, str]]) -> None:
        """Show a step's metrics, and a prompt with its response, which are asked for where they are shown."""
        self.step, self._metrics = step, metrics
        self._seconds.append(metrics["time/step"])
        for label, key in TRENDS.items():
            self._trends[label].append(metrics[key])
        if self._live:
            self._sample = sample()
            self._live.update(self._render(), refresh=True)
        elif console.as_json():
            print(metrics_line(step, metrics), end="", flush=True)
        else:
            console.say(self._line())

    def __enter__(self) -> RunView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @property
    def _left(self) -> str:
        return clock(median(self._seconds) * (self.total - self.step))

    def _line(self) -> str:
        values = "  ".join(f"{label} {self._metrics[key]:.4g}" for label, key in TRENDS.items())
        speed = f"{self._metrics['perf/tokens_per_second/generator']:,.0f} tok/s"
        return f"ppo {self.step}/{self.total}  {values}  {speed}  {self._seconds[-1]:.1f} s  {self._left} left"

    def _render(self) -> RenderableType:
        prompt, response = (" ".join(text.split()) for text in self._sample)
        answer = Text.assemble((prompt, "dim"), "\n", response, overflow="ellipsis")
        parts = [self._head(), self._phases(), self._numbers(), answer]
        return Group(*(line for part in parts for line in (Text(), part)))

    def _head(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            Text(self.name, "bold"),
            Text(f"step {self.step} of {self.total}"),
            ProgressBar(total=self.total, completed=self.step, width=BAR_WIDTH),
            Text(f"{median(self._seconds):.2g} s a step, {self._left} left"),
        )
        return grid

    def _phases(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        whole = max(self._metrics["time/step"], 1e-9)
        for phase, roles in PHASES.items():
            seconds = self._metrics.get(f"time/{phase}", 0.0)
            speeds = [f"{role} {self._metrics[f'perf/tokens_per_second/{role}']:,.0f} tok/s" for role in roles]
            grid.add_row(
                Text(phase),
                ProgressBar(total=whole, completed=min(seconds, whole), width=BAR_WIDTH),
                Text(f"{seconds:.2f} s", justify="right"),
                Text(f"{seconds / whole:.0%}", justify="right"),
                Text(", ".join(speeds), "dim"),
            )
        return grid

    def _numbers(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for label, values in self._trends.items():
            grid.add_row(
                Text(label), Text(f"{values[-1]:.4g}", "bold", justify="right"), Text(sparkline(values), "cyan")
            )
        return grid
