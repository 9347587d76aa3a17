"""Policy and critic together: a critic of its own, or a value head on the policy's trunk.

Both answer one call with log-probabilities, entropies and values of a micro-batch, all aligned to the token that they
are about.  The separate critic starts from the reward model (Huang et al., N+); the shared head starts at zero
(Ziegler et al. 2019).  Ranks that hold a part each call every method but ``save`` together.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_ray.checkpoint import save_tree
from rlhf_ray.models import GPT2
from rlhf_ray.models.heads import SharedValueHead, ValueModel
from rlhf_ray.models.lora import learned_state
from rlhf_ray.models.scoring import autocast, response_layout, response_logprobs
from rlhf_ray.ops.logprobs import at_tokens
from rlhf_ray.types import Rollout
from rlhf_ray.workers.adapted import Adapters, load_learned_policy, save_learned_policy, take_learned
from rlhf_ray.workers.beside import beside
from rlhf_ray.workers.ranks import Ranks
from rlhf_ray.workers.sharding import rest, shard, whole
from rlhf_ray.workers.snapshot import copy_of_module, shape_of_module

APART = 256
"""Width up to which policy and critic have threads of their own on a CPU; wider products share threads well."""
CLIP_EPSILON = 1e-6
"""What torch adds to a norm before it divides by it."""


class PolicyCritic(Protocol):
    """What the learner trains."""

    policy: GPT2
    adapters: Adapters | None
    """How the policy is adapted; None where every weight learns."""
    device: torch.device
    dtype: torch.dtype
    """Compute type; parameters are float32."""
    temperature: float
    """Divides the logits."""

    def __call__(self, micro: Rollout, *, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logprobs, entropy (if asked) and values of the response tokens, (b, t) float32 each, 0 elsewhere."""
        ...

    def parameter_groups(self, lr: float, value_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """AdamW's groups; weight decay on matrices alone."""
        ...

    def clip_gradients(self, max_norm: float, ranks: Ranks) -> dict[str, float]:
        """Clip, each network by its own norm (0 clips nothing), and return the norms before."""
        ...

    def shard(self) -> None:
        """Share the parameters out among all ranks, before an optimiser sees them."""
        ...

    def rest(self) -> None:
        """Hold a part again where each rank holds one, after forward passes that no backward pass has followed."""
        ...

    def snapshot(self) -> PolicyCritic:
        """A copy in host memory, of the first rank if each holds a part; later updates do not touch it."""
        ...

    def save(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder, and the critic inside it."""
        ...

    def load(self, folder: Path) -> None:
        """Take over the weights of ``save``."""
        ...


def _groups(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in parameters if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]


def _clip(parameters: Iterable[nn.Parameter], max_norm: float, ranks: Ranks) -> float:
    trained = [p for p in parameters if p.requires_grad]
    norm = whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    norm = ranks.same(norm)
    length = float(norm)
    if 0 < max_norm < length + CLIP_EPSILON:  # else clipping multiplies by one
        nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return length


class SeparateCritic:
    """A critic with a trunk of its own."""

    def __init__(
        self,
        policy: GPT2,
        critic: ValueModel,
        *,
        temperature: float,
        dtype: torch.dtype,
        special: dict[str, int],
        adapters: Adapters | None = None,
        compiled: bool = False,
    ) -> None:
        """Networks that are ``compiled`` stay on one thread: torch's compiler expects no other."""
        self.policy = policy
        self.critic = critic
        self.adapters = adapters
        self.device = policy.wte.weight.device
        self.dtype = dtype
        self.special = special
        self.temperature = temperature
        self._shapes = self.policy, self.critic
        self._apart = (
            self.device.type == "cpu" and dtype == torch.float32 and policy.config.n_embd <= APART and not compiled
        )

    def __call__(self, micro: Rollout, *, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logprobs, entropy and values, (b, t)."""
        layout, tokens = response_layout(micro, self.device), micro.tokens.to(self.device)

        def policy() -> tuple[Tensor, ...]:
            states = self.policy.states(tokens, layout)  # (n, D)
            logprobs, entropy = response_logprobs(
                self.policy, states, micro, temperature=self.temperature, with_entropy=with_entropy
            )
            return (logprobs,) if entropy is None else (logprobs, entropy)

        def critic() -> tuple[Tensor, ...]:
            return (at_tokens(self.critic.values(tokens, layout), micro.response_mask),)

        if self._apart and torch.get_num_threads() > 1:
            said, (values,) = beside(policy, critic)
        else:
            with autocast(self.device, self.dtype):
                said, (values,) = policy(), critic()
        return said[0], said[1] if with_entropy else None, values

    def parameter_groups(self, lr: float, value_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Two groups a network."""
        policy = _groups(self.policy.parameters(), lr, weight_decay)
        return policy + _groups(self.critic.parameters(), value_lr, weight_decay)

    def clip_gradients(self, max_norm: float, ranks: Ranks) -> dict[str, float]:
        """Policy and critic, each by its own norm."""
        return {
            "policy/grad_norm": _clip(self.policy.parameters(), max_norm, ranks),
            "critic/grad_norm": _clip(self.critic.parameters(), max_norm, ranks),
        }

    def shard(self) -> None:
        """Both networks; all ranks put weights together in one order, so one network then follows the other."""
        self._apart = False
        self._shapes = shape_of_module(self.policy), shape_of_module(self.critic)
        shard(self.policy, self.policy.h, forward="states")
        shard(self.critic, self.critic.trunk.h, forward="values")

    def rest(self) -> None:
        """Both networks."""
        rest(self.policy, self.critic)

    def snapshot(self) -> SeparateCritic:
        """Both networks."""
        twin, (policy, critic) = copy(self), self._shapes
        twin.policy, twin.critic = copy_of_module(self.policy, policy), copy_of_module(self.critic, critic)
        return twin

    def save(self, folder: Path) -> None:
        """The policy in the folder, the critic beside it, exactly: a model folder would fold its bias."""
        save_learned_policy(self.policy, self.adapters, folder, self.special)
        save_tree(folder / "critic", learned_state(self.critic))

    def load(self, folder: Path) -> None:
        """Both networks."""
        load_learned_policy(self.policy, self.adapters, folder)
        take_learned(self.critic, folder / "critic")


class SharedCritic:
    """A value head on the policy's trunk: one forward pass, one gradient."""

    def __init__(
        self,
        policy: GPT2,
        *,
        temperature: float,
        dtype: torch.dtype,
        special: dict[str, int],
        adapters: Adapters | None = None,
    ) -> None:
        self.policy = policy
        self.head = SharedValueHead(policy)
        self.adapters = adapters
        self.device = policy.wte.weight.device
        self.dtype = dtype
        self.special = special
        self.temperature = temperature
        self._shapes = self.policy, self.head

    def __call__(self, micro: Rollout, *, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logprobs, entropy and values, (b, t)."""
        with autocast(self.device, self.dtype):
            states = self.policy.states(micro.tokens.to(self.device), response_layout(micro, self.device))  # (n, D)
            logprobs, entropy = response_logprobs(
                self.policy, states, micro, temperature=self.temperature, with_entropy=with_entropy
            )
        return logprobs, entropy, at_tokens(self.head(states), micro.response_mask)

    def parameter_groups(self, lr: float, value_lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The trunk at the policy's rate, the head at the critic's."""
        return _groups(self.policy.parameters(), lr, weight_decay) + _groups(
            self.head.parameters(), value_lr, weight_decay
        )

    def clip_gradients(self, max_norm: float, ranks: Ranks) -> dict[str, float]:
        """Trunk and head by one norm."""
        return {"policy/grad_norm": _clip([*self.policy.parameters(), *self.head.parameters()], max_norm, ranks)}

    def shard(self) -> None:
        """Trunk and head."""
        self._shapes = shape_of_module(self.policy), shape_of_module(self.head)
        shard(self.policy, self.policy.h, forward="states")
        shard(self.head, (), forward="forward")

    def rest(self) -> None:
        """Trunk and head."""
        rest(self.policy, self.head)

    def snapshot(self) -> SharedCritic:
        """Trunk and head."""
        twin, (policy, head) = copy(self), self._shapes
        twin.policy, twin.head = copy_of_module(self.policy, policy), copy_of_module(self.head, head)
        return twin

    def save(self, folder: Path) -> None:
        """The policy in the folder, the head beside it."""
        save_learned_policy(self.policy, self.adapters, folder, self.special)
        save_tree(folder / "value_head", learned_state(self.head))

    def load(self, folder: Path) -> None:
        """Trunk and head."""
        load_learned_policy(self.policy, self.adapters, folder)
        take_learned(self.head, folder / "value_head")
