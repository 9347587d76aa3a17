"""What the learner holds, and when: policy, critic and optimiser, what a step keeps, and copies of them.

Left out on purpose: what FSDP2 puts together while it computes; each rank is taken to hold its part.
"""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.planning import sizes
from rlhf_ray.planning.needs import MIB, Need
from rlhf_ray.planning.roles import Work
from rlhf_ray.planning.sizes import FLOAT

COMPILER = 60 * MIB
"""Of torch's compiler, which its checkpointing imports."""


def learner(work: Work) -> Need:
    """The learner of a run."""
    return Learner(work).need()


class Learner:
    """Who learns."""

    def __init__(self, work: Work) -> None:
        config, models = work.config, work.models
        self.work, self.config = work, config
        self.adapted = config.lora.rank > 0
        self.kind = config.memory.frozen if self.adapted else "float32"
        """How the weights of a pass are stored."""
        self.shapes = [models.policy]
        if config.ppo.critic == "separate":
            self.shapes.append(models.critic or models.policy)
        self.own_base = models.critic is not None
        """Whether a critic below adapters has weights of its own."""

    def need(self) -> Need:
        """What is held, and what comes and goes."""
        config, work = self.config, self.work
        trained = self._trained()
        moments = sizes.moments(trained, config.memory.optimizer_bits)
        held = {"weights": FLOAT * trained + self._bases(), "moments": moments}
        judge = {"passes": work.scoring(self.shapes[0], kind=self.kind, head=True, entropy=True)}
        learn = self._learn(trained)
        passing: dict[str, Mapping[str, int]] = {"judge": judge, "learn": learn}
        if config.memory.activation_checkpointing and work.device == "cpu":
            held["compiler"] = COMPILER
        if work.direct:
            held["versions"] = (config.max_staleness + 1) * work.published()
        if work.device == "cuda":
            if config.memory.offload_optimizer:
                del held["moments"]  # which are there while a step is made
            return work.need("learner", config.num_learners, held, passing)
        saving = {"snapshot": FLOAT * trained + moments, "files": self._files()}
        if config.max_staleness:
            learn.update(saving)  # which may still be on their way to the disk
        passing |= {"publish": {"buffer": work.published()}, "save": saving}
        return work.need("learner", config.num_learners, held, passing)

    def _trained(self) -> int:
        """Numbers that learn, of one learner."""
        lora = self.config.lora
        numbers = [
            sizes.adapters(s, lora.rank, lora.targets) if lora.rank else sizes.parameters(s) for s in self.shapes
        ]
        score = self.shapes[-1].n_embd + 1
        shared_out = self.config.num_learners if self.config.sharding == "fsdp2" else 1
        return (sum(numbers) + score) // shared_out

    def _bases(self) -> int:
        """Bytes below adapters, but for what all processes of a host share."""
        if not self.adapted:
            return 0
        policy, *critic = self.shapes
        own = critic if self.own_base and not self.work.models.critic_over else []
        mapped = self.work.shares and self.work.device == "cpu"
        below = self.work.adapters if critic and self.work.models.critic_over else 0  # those of the reward model
        return (0 if mapped else self.work.frozen(policy)) + sum(map(self.work.frozen, own)) + below

    def _learn(self, trained: int) -> dict[str, int]:
        """What a step holds at most: in a backward pass, or where it ends, when all gradients are there."""
        config, work, policy = self.config, self.work, self.shapes[0]
        micro, number = work.micro, work.number
        checkpointing = config.memory.activation_checkpointing
        gradients = {"gradients": FLOAT * trained}
        tables = 0 if self.adapted else 2 * FLOAT * policy.vocab_size * policy.n_embd  # two gradients of one embedding
        ends = {**gradients, "tables": tables}
        if config.memory.offload_optimizer and work.device == "cuda":
            ends["moments"] = sizes.moments(trained, config.memory.optimizer_bits)
        both_ways = sizes.head(
            policy,
            micro.read,
            number=number,
            device=work.device,
            entropy=config.ppo.entropy_coef > 0,
            learns="states" if self.adapted else "weight",
        )
        kept = sum(sizes.kept(shape, micro, number=number, checkpointing=checkpointing) for shape in self.shapes)
        passes = {"kept": kept, "logits": max(both_ways)}
        if self.kind == "float32":
            passes["casts"] = sum(sizes.casts(shape, number=number) for shape in self.shapes)
        else:
            passes["unpacking"] = sizes.unpacking(policy, self.kind, number=number, device=work.device)
        if config.ppo.mini_batch_size > micro.rows:
            passes.update(gradients)  # of the micro-batches before
        return max(passes, ends, key=lambda parts: sum(parts.values()))

    def _files(self) -> int:
        """Bytes of what a checkpoint's model is put together from: transposed matrices, after merging adapters."""
        policy = self.shapes[0]
        return FLOAT * sizes.projections(policy) * (2 if self.adapted else 1)
