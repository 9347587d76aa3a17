"""The configuration of a PPO run; the equations and their sources are in docs/ALGORITHMS.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.amounts import Amount
from rlhf_ray.config.loader import Section
from rlhf_ray.config.lora import LoRA
from rlhf_ray.config.memory import Memory
from rlhf_ray.config.run_fields import RunFields


class Generation(Section):
    """How rollout workers sample."""

    temperature: float = Field(1.0, gt=0)
    """Also divides the logits of policy and reference wherever logprobs are taken."""
    response_length: int = Field(48, ge=1)
    """Tokens of a response, at most, its EOS included."""
    prompt_length: int = Field(128, ge=1)
    """Tokens of a prompt, at most."""
    long_prompts: Literal["drop", "cut"] = "drop"
    """What happens to longer prompts; either way they are counted."""
    shard_size: int = Field(32, ge=1)
    """Rows that one worker generates in one call, and that are scored together."""
    max_rows: int = Field(0, ge=0)
    """Rows that one worker has in its cache at once, the others of its shard waiting; 0 is all of them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the generator's weights and cache; on a CPU without bfloat16 instructions it halves memory traffic."""
    engine: Literal["auto", "native", "torch"] = "auto"
    """native: a small pass compiled at first use, CPU alone; torch: plain torch; auto: native where it can run."""
    stop: list[str] = []
    """Strings that end a response by the token that completes one."""


class KL(Section):
    """The KL penalty inside the reward."""

    coef: float = Field(0.05, ge=0)
    """beta; the starting value of the adaptive controller."""
    adaptive: bool = False
    target: float = Field(6.0, gt=0)
    """Nats per sequence that the adaptive controller steers to."""
    horizon: int = Field(10_000, ge=1)
    """Sequences over which the adaptive controller moves."""
    rollback_factor: float = Field(2.0, ge=1)
    """What every rollback multiplies the coefficient by; one of 0 counts as 0.01."""


class RewardSource(Section):
    """One term of the reward; the scores of several are added with their weights."""

    kind: Literal["model", "function", "http"] = "model"
    source: str = "checkpoints/reward_model/default"
    """A reward model's folder or run, path/to/file.py:function, or a URL."""
    weight: float = 1.0
    timeout: float = Field(30.0, gt=0)
    """Seconds for one HTTP request."""
    retries: int = Field(3, ge=0)
    """Further HTTP attempts, with growing pauses."""


class PPO(Section):
    """The update."""

    epochs: int = Field(4, ge=1)
    """Passes over one batch of experience."""
    mini_batch_size: int = Field(64, ge=1)
    """Rows of one optimiser step."""
    micro_batch_size: int = Field(16, ge=1)
    """Rows of one forward pass."""
    micro_batch_tokens: int = Field(0, ge=0)
    """Instead, tokens of one forward pass, prompt and response; 0 lets rows decide. Short: --micro-batch-tokens."""
    lr: float = Field(1e-5, gt=0)
    value_lr: float = Field(0.0, ge=0)
    """Learning rate of a separate critic; 0 takes the policy's."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_fraction: float = Field(0.0, ge=0, le=0.1)
    """Share of the run's steps with a rising learning rate."""
    adam_eps: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradient clipping; 0 turns it off."""
    gamma: float = Field(1.0, ge=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float = Field(0.0, ge=0)
    """Bound on the loss of a bad token whose ratio has run away; 0 turns it off, 3 is usual."""
    value_clip: float = Field(0.2, ge=0)
    """How far a value may move from the old one in the value loss; 0 leaves it free."""
    value_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    missing_eos_penalty: float | None = None
    """For a response without EOS; unset leaves its score alone."""
    missing_eos: Literal["replace", "subtract"] = "replace"
    """Whether that penalty replaces the score or is taken off it."""
    score_clip: float = Field(0.0, ge=0)
    """Scores are clipped to plus and minus this; 0 turns it off."""
    importance_cap: float = Field(2.0, ge=0)
    """With max_staleness > 0 a token's loss is multiplied by how much likelier the policy has become since it was
    sampled, at most this; 0 turns it off."""
    target_update_kl: float = Field(0.0, ge=0)
    """Leave the epochs when the update's own KL exceeds this; 0 turns it off."""
    critic: Literal["separate", "shared"] = "separate"
    """A network of its own, started from the reward model, or a value head on the policy's trunk."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute type of the learner; weights and optimiser stay float32."""
    compile: bool = False
    """Compile the blocks of policy and critic: slow to begin, then somewhat faster."""


Label = Annotated[str, Field(pattern=r"^[^=]+=[^=]+$")]


class Labels(Section):
    """For each role, the machines that it prefers, by Ray's node labels: ``ray.io/accelerator-type=H100``."""

    rollout: list[Label] = []
    reward: list[Label] = []
    reference: list[Label] = []
    learner: list[Label] = []


class PPOConfig(RunFields):
    """Reinforcement learning from human feedback with PPO."""

    policy: Path = Path("checkpoints/sft/default")
    """The SFT policy: where the policy starts, and the frozen reference."""
    reward: list[str] = []
    """Short form of rewards: path/to/file.py:function, a URL or a reward model's folder, each with weight 1."""
    rewards: list[RewardSource] = [RewardSource()]
    """Terms of the reward."""
    judges: list[str] = []
    """path/to/file.py:function, called as a reward is on 32 rows of every step, and logged as judge/<function>; nothing
    learns from it, so it shows when the reward is exploited."""
    critic_init: Path | None = None
    """Reward model that a separate critic starts from; unset takes the first reward model, else the policy."""
    prompts: Path = Path("data/raw/prompts.txt")
    template: Literal["chat", "alpaca", "plain"] = "chat"

    num_rollout_workers: int = Field(2, ge=0)
    """Ray actors that generate; 0 runs every role in this process."""
    num_reward_workers: int = Field(1, ge=1)
    num_reference_workers: int = Field(1, ge=1)
    num_learners: int = Field(1, ge=1)
    """Ray actors that share every mini-batch; the gradient does not depend on how many."""
    sharding: Literal["none", "fsdp2"] = "none"
    """What each of several learners holds of policy, critic and optimiser: none: all; fsdp2: a part."""
    weight_sync: Literal["auto", "store", "direct"] = "auto"
    """How weights reach rollout workers. store: through Ray's object store; direct: read by those on the learner's GPU
    from its memory, or broadcast by a learner without one; auto: today the store."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rollout_cpus: float = Field(0.25, gt=0)
    """CPU share that one rollout worker reserves: bookkeeping for placement, not a limit."""
    service_cpus: float = Field(0.1, gt=0)
    """The same for one reward or reference worker, or one learner."""
    rollout_gpus: float = Field(0.2, ge=0)
    """GPUs of one rollout worker, where there are any."""
    reward_gpus: float = Field(0.1, ge=0)
    reference_gpus: float = Field(0.1, ge=0)
    learner_gpus: float = Field(0.4, ge=0)
    placement: Literal["pack", "spread"] = "pack"
    """pack: every worker on the driver's machine while it has room, then on the next; spread: rollout workers on as
    many machines as there are."""
    rollout_device: Literal["same", "any", "cpu"] = "same"
    """same: rollout workers have the device of the other roles; cpu: cores alone; any: a GPU share where their machine
    has one left, else cores, which lets rounding depend on who generated a row."""
    labels: Labels = Labels()
    """Machines that a role prefers."""
    rollout_threads: int = Field(0, ge=0)
    """Threads of one rollout worker; 0 shares the cores out among them, or takes 1 where plain torch generates, whose
    sums depend on it."""
    scoring_threads: int = Field(1, ge=1)
    """Torch threads of one reward or reference worker."""
    learner_threads: int = Field(0, ge=0)
    """Torch threads of one learner; 0 shares a machine's cores out among its learners. In float32 sums depend on it."""
    timeout: float = Field(1800.0, gt=0)
    """Seconds that a worker may take to start, or the learner over one call."""
    call_timeout: float = Field(600.0, gt=0)
    """Seconds that a rollout, reward or reference worker may take over one shard; after that it is replaced."""
    max_restarts: int = Field(10, ge=0)
    """Deaths of workers within restart_window that the run stands before it saves and stops; with a machine die all
    workers on it."""
    restart_window: float = Field(600.0, gt=0)
    """Seconds."""

    batch_size: int = Field(128, ge=1)
    """Rows of one step."""
    group_size: int = Field(1, ge=1)
    """Responses of one prompt in one step."""
    total_steps: int = Field(100, ge=1)
    on_divergence: Literal["warn", "stop", "rollback"] = "warn"
    """What a divergence does (docs/DOCTOR.md): warn: it is said; stop: the run ends with an error and saves nothing of
    it; rollback: the last healthy checkpoint and a higher KL coefficient, twice at most, then stop."""
    max_staleness: int = Field(0, ge=0, le=4)
    """Batches that generation is ahead of learning; 0 takes turns."""
    save_every: int = Field(25, ge=1)
    """Steps between two checkpoints."""
    samples_every: int = Field(1, ge=1)
    """Steps between two parquet files of samples."""
    sample_rows: int = Field(32, ge=0)
    """Rows of such a file: an eighth the best of the step, an eighth the worst, the others at random."""
    probes: int = Field(8, ge=0)
    """Prompts that are answered again and again, with the same random numbers, to see what changes."""
    probe_every: int = Field(25, ge=1)
    """Steps between two rounds of answers to them, beside one before the first step and one after the last."""
    probe_prompts: Path | None = None
    """Where they are taken from, evenly spread; unset takes them from prompts."""

    generation: Generation = Generation()
    kl: KL = KL()
    ppo: PPO = PPO()
    memory: Memory = Memory()
    gpu_memory: Amount | None = None
    """What all workers together may take of the card, such as 6GB; unset takes what is free when the run begins, less a
    margin."""
    host_memory: Amount | None = None
    """The same of a machine without a GPU; unset takes all that it has."""
    lora: LoRA = LoRA()
    """Adapters of the policy, and of a separate critic; the learner's policy without them is the reference, and there
    are no reference workers."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> PPOConfig:
        if self.profile_step > self.total_steps:
            raise ValueError(f"profile_step = {self.profile_step} is after the last step, {self.total_steps}")
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of group_size = {self.group_size}")
        if self.ppo.mini_batch_size > self.batch_size:
            raise ValueError(
                f"ppo.mini_batch_size = {self.ppo.mini_batch_size} is larger than batch_size = {self.batch_size}"
            )
        return self

    @model_validator(mode="after")
    def _learners_fit(self) -> PPOConfig:
        if self.num_learners > 1 and not self.num_rollout_workers:
            raise ValueError(
                f"num_learners = {self.num_learners} are Ray actors, and num_rollout_workers = 0 is without Ray: "
                "take at least one rollout worker, or one learner"
            )
        if self.weight_sync == "direct" and not self.num_rollout_workers:
            raise ValueError(
                "weight_sync = direct is between Ray actors, and num_rollout_workers = 0 is without Ray: take at least "
                "one rollout worker, or weight_sync = auto"
            )
        if self.num_learners == 1 and self.sharding != "none":
            raise ValueError(
                f"sharding = {self.sharding} needs several learners to hold a part each: num_learners is 1"
            )
        if self.sharding != "none" and (self.memory.optimizer_bits == 8 or self.memory.offload_optimizer):
            raise ValueError(
                f"sharding = {self.sharding} shares out moments of 32 bits, and leaves them where they are: take "
                "memory.optimizer_bits 32 without memory.offload_optimizer, or --sharding none"
            )
        if self.auto_micro_batch and self.sharding != "none":
            raise ValueError(
                f"auto_micro_batch and sharding = {self.sharding} exclude each other: ranks that hold parts must "
                "compute equally often; take --sharding none, or a smaller ppo.micro_batch_size"
            )
        if self.lora.rank and self.sharding != "none":
            raise ValueError(
                f"sharding = {self.sharding} and lora.rank = {self.lora.rank} exclude each other: adapters and their "
                "optimiser are too small to share out; take --sharding none"
            )
        return self

    @property
    def reward_sources(self) -> list[RewardSource]:
        """``reward`` (short form) when given, else ``rewards``."""
        if not self.reward:
            return self.rewards
        return [RewardSource(kind=_kind(source), source=source) for source in self.reward]


def _kind(source: str) -> Literal["model", "function", "http"]:
    if source.startswith(("http://", "https://")):
        return "http"
    return "function" if ".py:" in source else "model"
