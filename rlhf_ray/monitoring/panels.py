"""What the dashboards show: the same panels in Grafana and on the page that Prometheus itself serves."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.monitoring.metrics import PHASES

RUN = 'run="$run"'
"""The selector of the run that is looked at; ``$run`` is filled in by the dashboard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One query of a panel, which may have several series."""

    query: str
    legend: str
    """``{{role}}`` stands for a label's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One picture."""

    title: str
    unit: str
    """Grafana's name of it: s, short, percentunit, tokens/s."""
    lines: tuple[Line, ...]
    stacked: bool = False


def _one(title: str, unit: str, metric: str, legend: str) -> Panel:
    return Panel(title=title, unit=unit, lines=(Line(query=f"ray_rlhf_{metric}{{{RUN}}}", legend=legend),))


ROWS: dict[str, tuple[Panel, ...]] = {
    "Does it learn?": (
        _one("Score", "short", "score_mean", "mean of a batch"),
        _one("KL from the reference", "nats", "kl_nats", "mean of a response"),
        _one("Entropy", "nats", "entropy_nats", "mean of a token"),
        _one("Response length", "tokens", "response_tokens", "mean"),
        _one("Responses that end by themselves", "percentunit", "eos_ratio", "share"),
        _one("Returns explained by the critic", "percentunit", "value_explained_ratio", "share of the variance"),
    ),
    "How fast is it?": (
        Panel(
            title="Step",
            unit="s",
            lines=tuple(Line(query=f"ray_rlhf_{phase}_seconds{{{RUN}}}", legend=phase) for phase in PHASES),
            stacked=True,
        ),
        _one("Throughput of the roles", "tokens/s", "throughput_tokens_per_second", "{{role}}"),
        Panel(
            title="Busy share of the workers",
            unit="percentunit",
            lines=(Line(query=f"rate(ray_rlhf_worker_busy_seconds_total{{{RUN}}}[1m])", legend="{{worker}}"),),
        ),
        Panel(
            title="Speed of the workers",
            unit="tokens/s",
            lines=(
                Line(
                    query=f"rate(ray_rlhf_worker_tokens_total{{{RUN}}}[1m])"
                    f" / rate(ray_rlhf_worker_busy_seconds_total{{{RUN}}}[1m])",
                    legend="{{worker}}",
                ),
            ),
        ),
    ),
    "Is it well?": (
        _one("Steps done", "short", "step", "steps"),
        _one("Age of the oldest row", "updates", "staleness_updates", "updates"),
        _one("Workers replaced", "short", "restarts", "since the run began"),
        _one("Calls that wait for a worker", "short", "waiting_jobs", "{{role}}"),
        _one("Calls under way", "short", "running_jobs", "{{role}}"),
        _one("Memory of the workers", "bytes", "worker_memory_bytes", "{{worker}}"),
    ),
}
"""Headings and their panels."""
