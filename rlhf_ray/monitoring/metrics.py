"""Every metric that a run tells Prometheus: names, meanings, and where the values come from.

All have the same labels: ``run``, ``role`` and ``worker``, empty where they don't apply.  Ray puts ``ray_`` before the
names and adds the machine.  docs/MONITORING.md shows the list.

Left out on purpose: runs without Ray, whose metrics.jsonl and TensorBoard say the same.
"""

from __future__ import annotations

from dataclasses import dataclass

LABELS = ("run", "role", "worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: what it is called, what it means, and where its value comes from."""

    name: str
    """Without Ray's ``ray_``; the unit is the last word."""
    meaning: str
    """One sentence, Prometheus' help text."""
    key: str = ""
    """The value of metrics.jsonl that it shows; empty for a worker's own."""
    role: str = ""
    counter: bool = False
    """Whether it only grows; Ray then adds ``_total``."""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"ray_{self.name}_total" if self.counter else f"ray_{self.name}"


ROLES = ("generator", "reward", "reference", "learner")
PHASES = {"generate": "waiting for rollouts", "judge": "waiting for scores, reference and values"} | {
    "learn": "the learner's update",
    "publish": "sending weights to the rollout workers",
}

STEP = (
    Metric(name="rlhf_step", meaning="Steps done.", key="step"),
    Metric(name="rlhf_step_seconds", meaning="Duration of the last step.", key="time/step"),
    *(
        Metric(name=f"rlhf_{phase}_seconds", meaning=f"Part of the last step: {what}.", key=f"time/{phase}")
        for phase, what in PHASES.items()
    ),
    *(
        Metric(
            name="rlhf_throughput_tokens_per_second",
            meaning="Tokens of the last step per busy second of a worker, times the workers.",
            key=f"perf/tokens_per_second/{role}",
            role=role,
        )
        for role in ROLES
    ),
    *(
        Metric(
            name="rlhf_busy_seconds",
            meaning="Seconds of the last step that the role's workers computed, all workers together.",
            key=f"perf/busy_seconds/{role}",
            role=role,
        )
        for role in ROLES
    ),
    Metric(name="rlhf_score_mean", meaning="Mean score of the last batch.", key="objective/scores"),
    Metric(name="rlhf_kl_nats", meaning="Mean KL of a response from the reference.", key="objective/kl"),
    Metric(name="rlhf_entropy_nats", meaning="Mean entropy of a token.", key="objective/entropy"),
    Metric(name="rlhf_eos_ratio", meaning="Share of responses that ended by themselves.", key="objective/eos_rate"),
    Metric(name="rlhf_response_tokens", meaning="Mean length of a response.", key="response_length/mean"),
    Metric(
        name="rlhf_value_explained_ratio",
        meaning="Share of the returns' variance that the critic explains.",
        key="val/explained_variance",
    ),
    Metric(name="rlhf_staleness_updates", meaning="Updates since the oldest row was sampled.", key="staleness/max"),
    Metric(name="rlhf_restarts", meaning="Workers replaced since the run began.", key="perf/restarts"),
)
"""The driver's, one value a step."""

WAITING = Metric(name="rlhf_waiting_jobs", meaning="Calls that are ready and wait for a worker of the role.")
RUNNING = Metric(name="rlhf_running_jobs", meaning="Calls that the role's workers are at.")
QUEUE = (WAITING, RUNNING)
"""A crew's, looked up every second."""

TOKENS = Metric(name="rlhf_worker_tokens", meaning="Tokens generated, scored or trained on.", counter=True)
BUSY = Metric(name="rlhf_worker_busy_seconds", meaning="Seconds that the worker computed.", counter=True)
MEMORY = Metric(name="rlhf_worker_memory_bytes", meaning="Memory that the worker's process has in use on its host.")
WORKER = (TOKENS, BUSY, MEMORY)
"""A worker's own."""

METRICS = STEP + QUEUE + WORKER
