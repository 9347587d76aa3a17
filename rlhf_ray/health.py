"""A run's health: the doctor beside it, what a divergence does, and the rows that no update was made from.

Left out on purpose: going back, which is the way of a run that lost its learner (``app.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf_ray.checkpoint import CheckpointStore, save_tree, step_name
from rlhf_ray.config import PPOConfig
from rlhf_ray.doctor import Doctor
from rlhf_ray.failures import Diverged
from rlhf_ray.run import Run, read_metrics
from rlhf_ray.types import Experience, Judged

MOST_ROLLBACKS = 2
MOST_DUMPS = 3
"""Steps whose skipped rows are kept; those after them are only counted."""
SETTLED = 5
"""Steps before the one that shows a divergence whose checkpoints are not trusted: rules wait up to three to be sure."""


class Health:
    """What is known of a run's health, and what it has cost so far."""

    def __init__(self, run: Run, config: PPOConfig, rollbacks: int) -> None:
        """``rollbacks`` is how often the run has gone back; a checkpoint may know of more."""
        self.run, self.on_divergence = run, config.on_divergence
        self.rollbacks = rollbacks
        self.skipped = run.folder / "skipped"
        self._kept = 0
        self._doctor = Doctor()

    def state_dict(self) -> dict[str, float]:
        """How often the run has gone back."""
        return {"rollbacks": self.rollbacks}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint."""
        self.rollbacks = max(self.rollbacks, int(state["rollbacks"]))

    def resume_at(self, step: int) -> None:
        """Take the metrics up to ``step`` as the past, and forget what came after."""
        self._doctor = Doctor(read_metrics(self.run.folder))
        for path in self.skipped.glob("step_*"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        self._kept = len(list(self.skipped.glob("*.json")))

    def see(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Look at a step and say what has begun; returns what its line of metrics is to hold of it."""
        own = {"doctor/rollbacks": float(self.rollbacks)} if self.rollbacks else {}
        return own | self._doctor.tell(step, {**metrics, **own}, self.run.say)

    def keep(self, step: int, judged: Judged, experience: Experience) -> None:
        """Write a step's rows down, some of which no update was made from; those of the first few such steps alone."""
        if self._kept < MOST_DUMPS:
            self._kept += 1
            self.skipped.mkdir(exist_ok=True)
            path = self.skipped / step_name(step)
            self.run.say(f"the rows of step {step} are kept in {path}.safetensors")
            self.run.later(_dump, path, judged, experience)

    def check(self, step: int) -> None:
        """Raise Diverged when the step shows a divergence and the run is not to go on with it."""
        found = [finding for finding in self._doctor.present if finding.severity == "divergence"]
        if found and self.on_divergence != "warn":
            what = f"the run has diverged: {found[0]}"
            raise Diverged(what, step=step, rollbacks=self.rollbacks)

    def go_back(self, store: CheckpointStore, diverged: Diverged) -> None:
        """Leave a course that has diverged, so that the newest checkpoint is a healthy one.

        Raises Diverged where the run is not to go back, has done so too often, or has nothing to go back to.
        """
        if self.on_divergence == "stop":
            raise diverged
        if self.rollbacks == MOST_ROLLBACKS:
            raise _again(f"{MOST_ROLLBACKS} rollbacks have not helped", diverged)
        store.forget(after=max(0, diverged.step - SETTLED))
        healthy = store.latest()
        if healthy is None:
            raise _again(f"there is no checkpoint {SETTLED} steps older to go back to", diverged)
        self.run.say(f"going back to {healthy.name} with a higher KL coefficient: {diverged}")


def _again(why: str, diverged: Diverged) -> Diverged:
    """The same, and why the run can't go back."""
    return Diverged(f"{why}: {diverged}", step=diverged.step, rollbacks=diverged.rollbacks)


def _dump(path: Path, judged: Judged, experience: Experience) -> None:
    rollout = judged.rollout
    tensors = {
        "tokens": rollout.tokens,
        "response_mask": rollout.response_mask,
        "prompt_ids": rollout.prompt_ids,
        "rollout_logprobs": rollout.rollout_logprobs,
        "old_logprobs": experience.old_logprobs,
        "ref_logprobs": judged.ref_logprobs,
        "scores": judged.scores,
        "values": experience.values,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    save_tree(path, tensors)
