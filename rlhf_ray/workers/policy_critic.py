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

from rlhf_ray.checkpoint import load_tree, save_tree
from rlhf_ray.models import GPT2
from rlhf_ray.models.gpt2 import compile_blocks
from rlhf_ray.models.heads import SharedValueHead, ValueModel
from rlhf_ray.models.hf_weights import WEIGHTS, load_policy, load_reward_model, save_policy
from rlhf_ray.models.scoring import autocast, response_layout, response_logprobs
from rlhf_ray.ops.logprobs import at_tokens
from rlhf_ray.rundir.fit import check_module
from rlhf_ray.types import Rollout
from rlhf_ray.workers.ranks import Ranks
from rlhf_ray.workers.sharding import load_whole, rest, shard, whole
from rlhf_ray.workers.snapshot import copy_of_module, shape_of_module


class PolicyCritic(Protocol):
    """What the learner trains."""

    policy: GPT2
    device: torch.device
    dtype: torch.dtype
    """Compute type; parameters are float32."""

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
    trained = list(parameters)
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    return [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
    ]


def _clip(parameters: Iterable[nn.Parameter], max_norm: float, ranks: Ranks) -> float:
    trained = list(parameters)
    norm = whole(nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
    norm = ranks.same(norm)
    nn.utils.clip_grads_with_norm_(trained, max_norm if max_norm > 0 else float("inf"), norm)
    return float(norm)


def _take(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    check_module(module, state, path)
    load_whole(module, state)


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
    ) -> None:
        self.policy = policy
        self.critic = critic
        self.device = policy.wte.weight.device
        self.dtype = dtype
        self.special = special
        self.temperature = temperature
        self._shapes = self.policy, self.critic

    def __call__(self, micro: Rollout, *, with_entropy: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logprobs, entropy and values, (b, t)."""
        layout, tokens = response_layout(micro, self.device), micro.tokens.to(self.device)
        with autocast(self.device, self.dtype):
            states = self.policy.states(tokens, layout)  # (n, D)
            values = self.critic.values(tokens, layout)  # (n,)
            logprobs, entropy = response_logprobs(
                self.policy, states, micro, temperature=self.temperature, with_entropy=with_entropy
            )
        return logprobs, entropy, at_tokens(values, micro.response_mask)

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
        """Both networks."""
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
        save_policy(self.policy, folder, **self.special)
        save_tree(folder / "critic", dict(self.critic.state_dict()))

    def load(self, folder: Path) -> None:
        """Both networks."""
        _take(self.policy, load_policy(folder).state_dict(), folder / WEIGHTS)
        _take(self.critic, load_tree(folder / "critic"), folder / "critic.safetensors")


class SharedCritic:
    """A value head on the policy's trunk: one forward pass, one gradient."""

    def __init__(self, policy: GPT2, *, temperature: float, dtype: torch.dtype, special: dict[str, int]) -> None:
        self.policy = policy
        self.head = SharedValueHead(policy)
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
        save_policy(self.policy, folder, **self.special)
        save_tree(folder / "value_head", dict(self.head.state_dict()))

    def load(self, folder: Path) -> None:
        """Trunk and head."""
        _take(self.policy, load_policy(folder).state_dict(), folder / WEIGHTS)
        _take(self.head, load_tree(folder / "value_head"), folder / "value_head.safetensors")


def build_policy_critic(
    kind: str,
    policy_folder: Path,
    critic_folder: Path | None,
    *,
    temperature: float,
    device: str,
    dtype: torch.dtype,
    special: dict[str, int],
    compiled: bool = False,
) -> PolicyCritic:
    """Policy and critic from their folders, in float32; without a critic folder the critic starts from the policy."""
    policy = load_policy(policy_folder, device=device, dtype=torch.float32).eval()
    if compiled:
        compile_blocks(policy)
    if kind == "shared":
        return SharedCritic(policy, temperature=temperature, dtype=dtype, special=special)
    assert kind == "separate", kind
    if critic_folder is not None:
        critic = load_reward_model(critic_folder, device=device, dtype=torch.float32)
    else:
        critic = ValueModel(load_policy(policy_folder, device=device, dtype=torch.float32))
        nn.init.zeros_(critic.score.weight)
    if compiled:
        compile_blocks(critic)
    return SeparateCritic(policy, critic.eval(), temperature=temperature, dtype=dtype, special=special)
