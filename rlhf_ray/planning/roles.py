"""Who holds what, and when, in a PPO run: the parts of ``sizes.py`` as the workers put them together.

Rows are taken to be of full length, so that what is predicted is what a run can come to.

Left out on purpose: the learner, which has a file of its own (``learner.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_ray.config import PPOConfig
from rlhf_ray.generation.native_engine import HEAD_ROWS
from rlhf_ray.generation.native_model import PASS_TOKENS
from rlhf_ray.generation.slots import ROW_BLOCK, doubled
from rlhf_ray.generation.torch_engine import PREFILL_TOKENS
from rlhf_ray.models.gpt2 import GPT2Config
from rlhf_ray.models.kv_cache import COLUMN_BLOCK, round_up
from rlhf_ray.planning import sizes
from rlhf_ray.planning.needs import Device, Need, base_of
from rlhf_ray.planning.sizes import FLOAT, HALF, Batch

SAMPLING = 3
"""Copies of the logits that drawing tokens takes on a GPU: logits, probabilities, and one of either."""
ROW_BYTES = 120
"""Of a token's entry in all tensors of a batch, a few copies of them."""
TOKEN_BYTES = 600
"""Of a token of the vocabulary and its merge in Python's dictionaries, measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The shapes of a run's models."""

    policy: GPT2Config
    rewards: tuple[GPT2Config, ...] = ()
    """Of each reward model; functions and servers have none."""
    critic: GPT2Config | None = None
    """What a separate critic starts from; None starts it from the policy."""
    over: tuple[bool, ...] = ()
    """Which of the reward models are adapters over the policy; as far as it is known."""
    critic_over: bool = False
    """Whether the one that a separate critic starts from is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A run, seen from each role."""

    config: PPOConfig
    models: Models
    device: Device
    prompt: int
    """Tokens of a prompt, at most."""

    @property
    def number(self) -> int:
        """Bytes of a number in the products of whoever scores or learns."""
        return HALF if self.config.ppo.dtype == "bfloat16" and self.device == "cuda" else FLOAT

    @property
    def sampled(self) -> int:
        """Bytes of one of the generator's numbers."""
        return HALF if self.config.generation.dtype == "bfloat16" else FLOAT

    @property
    def direct(self) -> bool:
        """Whether weights go out past the store."""
        return self.config.num_rollout_workers > 0 and self.config.weight_sync == "direct"

    @property
    def micro(self) -> Batch:
        """Rows of one forward pass of whoever scores or learns."""
        ppo, response = self.config.ppo, self.config.generation.response_length
        rows = ppo.micro_batch_size
        if ppo.micro_batch_tokens:
            rows = max(1, ppo.micro_batch_tokens // (self.prompt + response))
        return Batch(rows=min(rows, self.config.batch_size), prompt=self.prompt, response=response)

    @property
    def shares(self) -> bool:
        """Whether the policy below adapters is in memory once for all roles on the card, or on the host."""
        return self.config.lora.rank > 0 and self.config.memory.share_base

    @property
    def adapters(self) -> int:
        """Bytes of a policy's adapters."""
        return FLOAT * sizes.adapters(self.models.policy, self.config.lora.rank, self.config.lora.targets)

    def frozen(self, shape: GPT2Config, device: Device | None = None) -> int:
        """Bytes of weights that never learn; on a CPU float32 embeddings stay in their mapped file."""
        kind = self.config.memory.frozen
        if kind == "float32" and (device or self.device) == "cpu":
            return FLOAT * sizes.projections(shape)
        return sizes.stored(shape, kind)

    def scoring(self, shape: GPT2Config, *, kind: str, head: bool, entropy: bool = False) -> int:
        """What a pass that keeps nothing takes at most; ``kind`` is how its weights are stored."""
        body = sizes.passing(shape, self.micro.tokens, number=self.number)
        body += sizes.unpacking(shape, kind, number=self.number, device=self.device)
        if not head:
            return body
        forward, _ = sizes.head(
            shape, self.micro.read, number=self.number, device=self.device, entropy=entropy, learns="nothing"
        )
        return max(body, forward)

    def rollout(self) -> Need:
        """Weights, on a CPU packed as well, a cache, and what a pass makes."""
        config, shape, number = self.config, self.models.policy, self.sampled
        device: Device = "cpu" if config.rollout_device == "cpu" else self.device
        rows = min(config.generation.max_rows or config.generation.shard_size, config.generation.shard_size)
        columns = self.prompt + config.generation.response_length
        held = {"weights": number * sizes.parameters(shape)}
        made: dict[str, int] = {}  # of the weights, and for rows
        if config.lora.rank:
            kind, whole = config.memory.frozen, number * (shape.vocab_size + shape.n_positions) * shape.n_embd
            held = {"base": 0 if self.shares else self.frozen(shape, device), "adapters": self.adapters}
            held["embeddings"] = 0 if kind == "float32" and number == FLOAT else whole
        if device == "cpu":
            if self.direct and self.device == "cpu":
                held["arrived"] = self.published()
            made["packed"] = number * (sizes.projections(shape) + shape.vocab_size * shape.n_embd)
            columns = round_up(columns, COLUMN_BLOCK)
            passes = FLOAT * (6 * PASS_TOKENS * shape.n_embd + min(rows, HEAD_ROWS) * shape.vocab_size)
        else:
            rows, columns = doubled(rows, ROW_BLOCK), min(doubled(columns, COLUMN_BLOCK), shape.n_positions)
            passes = 2 * SAMPLING * FLOAT * rows * shape.vocab_size  # in the graphs' own memory and outside of it
            passes += sizes.passing(shape, min(PREFILL_TOKENS, rows * self.prompt), number=number)
            if config.lora.rank:  # which stay beside the base
                passes += sizes.unpacking(shape, config.memory.frozen, number=number, device="cuda")
        made["cache"] = sizes.cache(shape, rows, columns, number=number)
        generate = {"passes": passes}
        (generate if config.memory.sleep else held).update(made)
        return self.need("rollout", max(1, config.num_rollout_workers), held, {"generate": generate}, device)

    def reward(self) -> Need:
        """Reward models, which score one after the other; functions and servers take nothing."""
        shapes, workers, kind = self.models.rewards, self.config.num_reward_workers, self.config.memory.frozen
        if not shapes and self.device == "cuda":
            return Need(role="reward", processes=workers, device="cuda", base=0)
        passes = max((self.scoring(shape, kind=kind, head=False) for shape in shapes), default=0)
        over = self.models.over if self.config.lora.rank and any(self.models.over) else (False,) * len(shapes)
        held = {"weights": sum(self.frozen(shape) for shape, shares in zip(shapes, over, strict=True) if not shares)}
        if any(over):
            held["adapters"] = sum(over) * self.adapters
            held["base"] = 0 if self.shares else self.frozen(self.models.policy)
        if self.device == "cpu":
            held["vocabulary"] = self.vocabulary()
        return self.need("reward", workers, held, {"judge": {"passes": passes}})

    def reference(self) -> Need:
        """The frozen policy."""
        shape = self.models.policy
        passes = self.scoring(shape, kind=self.config.memory.frozen, head=True)
        held = {"weights": self.frozen(shape)}
        return self.need("reference", self.config.num_reference_workers, held, {"judge": {"passes": passes}})

    def base(self) -> Need:
        """The file of the base, which every process on the host maps; on a card the learner has it."""
        held = {"weights": sizes.stored(self.models.policy, self.config.memory.frozen)}
        return Need(role="base", processes=1, device="cpu", base=0, held=held)

    def driver(self) -> Need:
        """The rows of a batch."""
        rows = self.config.batch_size * (self.prompt + self.config.generation.response_length)
        held = {"rows": ROW_BYTES * rows, "vocabulary": self.vocabulary()}
        return self.need("driver", 1, held, {}, "cpu")

    def ray(self) -> Need:
        """Ray's own processes, and its store with two versions of the weights."""
        return self.need("ray", 1, {"store": 2 * self.published()}, {})

    def vocabulary(self) -> int:
        """Bytes of a tokenizer."""
        return TOKEN_BYTES * self.models.policy.vocab_size

    def published(self) -> int:
        """Bytes of one version of the policy on its way to the rollout workers."""
        lora, shape = self.config.lora, self.models.policy
        if lora.rank:
            return FLOAT * sizes.adapters(shape, lora.rank, lora.targets)
        return self.sampled * sizes.parameters(shape)

    def need(
        self,
        role: str,
        processes: int,
        held: Mapping[str, int],
        passing: Mapping[str, Mapping[str, int]],
        device: Device | None = None,
    ) -> Need:
        """A role's need, on the run's device unless it is said otherwise."""
        where = device or self.device
        base = base_of(role, where)
        return Need(role=role, processes=processes, device=where, base=base, held=held, passing=passing)
