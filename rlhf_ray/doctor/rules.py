"""The doctor's rules: one table, each a symptom in the newest steps with its likely cause and what may help.

Thresholds are those of docs/DOCTOR.md, with their sources.  They are wide: a rule that is silent for a healthy run is
read, one that is not is switched off.

Left out on purpose: what needs more than the metrics, such as reading the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlhf_ray.doctor import symptoms as see
from rlhf_ray.doctor.findings import Severity
from rlhf_ray.doctor.history import History


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One thing that the doctor looks for."""

    name: str
    symptom: Callable[[History], str | None]
    """What the newest step shows, in a clause with its numbers; None when all is well or the metric is not logged."""
    severity: Severity = "warning"
    cause: str
    remedy: str
    timed: bool = False
    """Whether it reads the clock, which no two runs agree on."""


RULES: tuple[Rule, ...] = (
    Rule(
        name="no_finite_update",
        symptom=see.no_finite_update,
        severity="divergence",
        cause="weights that have grown until they overflow, or data that is not numbers",
        remedy="look at the rows in skipped/, then lower ppo.lr or take dtype float32",
    ),
    Rule(
        name="kl_explosion",
        symptom=see.diverging_kl,
        severity="divergence",
        cause="a learning rate too high for the reward, or no price on the distance from the reference",
        remedy="lower ppo.lr, or raise kl.coef as --on-divergence rollback does by itself",
    ),
    Rule(
        name="collapse",
        symptom=see.collapsed,
        severity="divergence",
        cause="a reward that one answer satisfies whatever was asked, or a learning rate far too high",
        remedy="read the samples, mend the reward, lower ppo.lr, raise kl.coef or ppo.entropy_coef",
    ),
    Rule(
        name="not_finite",
        symptom=see.not_finite,
        cause="an overflow, or a reward or row that is not a number",
        remedy="look at the rows in skipped/, lower ppo.lr, or take dtype float32",
    ),
    Rule(
        name="skipped_update",
        symptom=see.skipped,
        cause="a mini-batch whose loss or gradient was not finite; the optimiser has not seen it",
        remedy="look at the rows in skipped/; if it comes back, lower ppo.lr or take dtype float32",
    ),
    Rule(
        name="reward_not_finite",
        symptom=see.unscored,
        cause="a reward that divides by nothing, or takes the logarithm of nothing, for some answers",
        remedy="mend the reward; such answers are in skipped/ and among the worst of samples/",
    ),
    Rule(
        name="rolled_back",
        symptom=see.rolled_back,
        severity="note",
        cause="a divergence after that checkpoint, which log.txt names",
        remedy="if it comes back, lower ppo.lr or begin with the higher kl.coef",
    ),
    Rule(
        name="negative_kl",
        symptom=see.negative_kl,
        cause="responses not drawn from the policy's own distribution, or log-probabilities at another temperature",
        remedy="sample without top-k, top-p or forced tokens, at the temperature of generation.temperature",
    ),
    Rule(
        name="high_kl",
        symptom=see.high_kl,
        cause="a policy that has left the reference, where the reward model was never trained",
        remedy="read the samples before believing the score; raise kl.coef, or take kl.adaptive",
    ),
    Rule(
        name="first_kl",
        symptom=see.first_kl_not_zero,
        cause="a reference that is not the policy's own starting point, or dropout",
        remedy="start policy and reference from one folder, without dropout",
    ),
    Rule(
        name="ratio",
        symptom=see.ratio_not_one,
        cause="old log-probabilities of other weights, or an update that goes much too far",
        remedy="lower ppo.lr or ppo.epochs, or set ppo.target_update_kl",
    ),
    Rule(
        name="reward_hacking",
        symptom=see.judge_disagrees,
        cause="a policy that exploits its reward model (Gao et al. 2023)",
        remedy="stop at the judge's best checkpoint; raise kl.coef, or train the reward model on such answers",
    ),
    Rule(
        name="length_drift",
        symptom=see.length_drifted,
        cause="a reward that likes long or short answers for their length",
        remedy="compare score and length in the samples; even the lengths out in the preference pairs",
    ),
    Rule(
        name="repetition",
        symptom=see.answers_repeat,
        cause="answers that loop because the reward does not mind",
        remedy="read the samples; raise kl.coef, or give such answers a low reward",
    ),
    Rule(
        name="entropy_collapse",
        symptom=see.entropy_gone,
        cause="a policy that has stopped trying anything else",
        remedy="raise ppo.entropy_coef or kl.coef, lower ppo.lr, or raise ppo.clip_high",
    ),
    Rule(
        name="entropy_rise",
        symptom=see.entropy_risen,
        cause="an entropy bonus or learning rate that makes the policy forget how to speak",
        remedy="lower ppo.entropy_coef or ppo.lr",
    ),
    Rule(
        name="no_eos",
        symptom=see.never_ends,
        cause="a policy that was not taught to end, or a generation.response_length too short for its answers",
        remedy="raise generation.response_length, or set ppo.missing_eos_penalty; see that SFT trains on the EOS",
    ),
    Rule(
        name="eos_at_once",
        symptom=see.empty_answers,
        cause="a reward that likes no answer better than any, such as too high a price on KL or a prompt that looks "
        "finished",
        remedy="read the samples; lower kl.coef, and give empty answers a low reward",
    ),
    Rule(
        name="critic",
        symptom=see.critic_worse_than_a_constant,
        cause="a critic that learns too slowly, or rewards that the prompt says nothing about",
        remedy="raise ppo.value_lr, start the critic from the reward model (critic_init), or free ppo.value_clip",
    ),
    Rule(
        name="clip_fraction",
        symptom=see.clipped_too_often,
        cause="updates that are larger than the trust region",
        remedy="lower ppo.lr or ppo.epochs, or set ppo.target_update_kl",
    ),
    Rule(
        name="flat_rewards",
        symptom=see.all_alike,
        cause="a reward that does not tell the answers of a batch apart, so that there is nothing to learn",
        remedy="look at the reward: a constant, a clip (ppo.score_clip) or a task that is always or never solved",
    ),
    Rule(
        name="no_progress",
        symptom=see.nothing_learned,
        severity="note",
        cause="a learning rate too low, a KL price too high, or a reward that is noise",
        remedy="raise ppo.lr or lower kl.coef, and see that the reward tells good samples from bad ones",
    ),
    Rule(
        name="generator_mismatch",
        symptom=see.generator_differs,
        cause="rollout workers with old weights, another number type or another temperature than the learner",
        remedy="take generation.dtype float32; if it stays, weights do not reach the generators",
    ),
    Rule(
        name="stale_weights",
        symptom=see.too_stale,
        cause="rows that are too old for a policy that moves this fast",
        remedy="lower max_staleness or ppo.lr",
    ),
    Rule(
        name="spike",
        symptom=see.spike,
        cause="a batch unlike the others, or a learning rate at the edge",
        remedy="look at the samples of that step; lower ppo.lr or ppo.max_grad_norm if it comes back",
    ),
    Rule(
        name="starved_learner",
        symptom=see.starved_learner,
        severity="note",
        timed=True,
        cause="generation or scoring that takes most of each step",
        remedy="let them overlap with --max-staleness 1, or take more rollout or reward workers",
    ),
    Rule(
        name="starved_generators",
        symptom=see.starved_generators,
        severity="note",
        timed=True,
        cause="more rollout workers than the learner can feed on",
        remedy="take fewer of them, or give the learner more (--num-learners, a GPU)",
    ),
)

TIMED = frozenset(rule.name for rule in RULES if rule.timed)
