"""The learner's update beside the machine's matrix products, and what the loss needs of memory beside full logits.

    python benchmarks/learner.py --json learner.json
    python benchmarks/learner.py --sizes mini_xl --rows 32 --prompt 64 --response 64 --mini 8

The update is PPO's own: policy and a critic of its own, epochs x mini-batches x micro-batches on random rows of full
length.  Its share counts the operations that it cannot do without, three times those of a forward pass: projections of
every token in both networks, causal attention, and logits of response tokens alone; recomputing something counts
nothing.  The memory is that of the gradient of one next-token loss in one forward pass, with activation checkpointing
but for the last line.  Each measurement is a program of its own, so that its peak memory is its own; the product that a
share is of is timed in the same program, before and after.

Left out on purpose: a peer; ``ppo_step.py`` and ``sft.py`` have one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from side_by_side import Report, Row, parser, run_program, seconds, shrink, words  # isort: skip
import torch
import torch.nn.functional as F
from machine import DTYPES, device, measure_limits, synchronise
from random_models import SIZES, VOCABULARIES
from torch import Tensor

from rlhf_ray.config import PPO, LoRA
from rlhf_ray.models import GPT2, ValueModel, preset
from rlhf_ray.models.adapter_folders import Base
from rlhf_ray.models.layout import Layout
from rlhf_ray.models.scoring import autocast, compute_type
from rlhf_ray.models.shared_base import FrozenBase
from rlhf_ray.ops.logprobs import before, weighted_nll_sum
from rlhf_ray.types import Experience, Rollout
from rlhf_ray.workers.build_learner import build_policy_critic
from rlhf_ray.workers.learner import LearnerWorker
from rlhf_ray.workers.policy_critic import PolicyCritic, SeparateCritic


def random_rollout(options: argparse.Namespace) -> Rollout:
    """Rows of full length."""
    rows, width = options.rows, options.prompt + options.response
    mask = torch.ones(rows, width, dtype=torch.bool)
    response = (torch.arange(width) >= options.prompt).expand(rows, width)
    numbers = torch.arange(rows)
    return Rollout(
        tokens=torch.randint(VOCABULARIES[options.size], (rows, width)),
        attention_mask=mask,
        response_mask=response,
        rollout_logprobs=torch.zeros(rows, width),
        prompt_ids=numbers,
        group_ids=numbers,
        policy_version=torch.zeros_like(numbers),
        finished=torch.zeros(rows, dtype=torch.bool),
    )


def make_learner(options: argparse.Namespace) -> LearnerWorker:
    """Policy and critic with random weights on the device."""
    config = preset(options.size, VOCABULARIES[options.size])

    def build() -> SeparateCritic:
        policy, critic = (GPT2(config, device=device()).eval() for _ in range(2))
        return SeparateCritic(policy, ValueModel(critic), temperature=1.0, dtype=DTYPES[options.dtype], special={})

    ppo = PPO(epochs=options.epochs, mini_batch_size=options.mini, micro_batch_size=options.micro)
    return worker(build, ppo, options)


def worker(
    build: Callable[[], PolicyCritic], ppo: PPO, options: argparse.Namespace, *, bits: int = 32
) -> LearnerWorker:
    """A learner of a long run."""
    return LearnerWorker(
        build,
        ppo,
        seed=0,
        total_steps=100,
        response_length=options.response,
        rollout_dtype=torch.float32,
        threads=options.threads,
        optimizer_bits=bits,
    )


def open_pair(
    folder: Path, *, rank: int = 0, frozen: str = "float32", checkpointing: bool = False, shared: bool = False
) -> Callable[[], PolicyCritic]:
    """What opens ``policy/`` and a critic made of ``reward/``, with these savers."""
    return partial(
        build_policy_critic,
        "separate",
        folder / "policy",
        folder / "reward",
        temperature=1.0,
        device=str(device()),
        dtype=torch.float32,
        special={},
        compiled=False,
        checkpointing=checkpointing,
        lora=LoRA(rank=rank),
        base=FrozenBase(base=Base.of(folder / "policy", frozen=frozen), shared=shared) if rank else None,
        seed=0,
    )


def made_up_experience(learner: LearnerWorker, rollout: Rollout) -> Experience:
    """Rows as the learner sees them, with advantages at random."""
    found = learner.evaluate(rollout)
    assert found.values is not None
    return Experience(
        rollout=rollout,
        old_logprobs=found.old_logprobs,
        advantages=torch.randn_like(found.values),
        values=found.values,
        returns=found.values + rollout.response_mask,
    )


def forward_flops(options: argparse.Namespace) -> float:
    """Operations of a forward pass of both networks over the rows."""
    model = preset(options.size, VOCABULARIES[options.size])
    length = options.prompt + options.response
    tokens = options.rows * length
    projections = 2 * 12 * model.n_layer * model.n_embd**2 * tokens
    attention = model.n_layer * 4 * model.n_embd * (length / 2) * tokens
    logits = 2 * model.n_embd * model.vocab_size * options.rows * options.response
    return 2 * (projections + attention) + logits


def measure_update(options: argparse.Namespace) -> Row:
    """Seconds of evaluate and update, medians of the repetitions after one that is not counted."""
    learner, rollout = make_learner(options), random_rollout(options)
    evaluating, updating, peaks = [], [], []
    for _ in range(options.repetitions + 1):
        peaks.append(measure_limits([options.dtype], quick=options.quick).flops[options.dtype])
        start = time.perf_counter()
        experience = made_up_experience(learner, rollout)
        synchronise()
        evaluating.append(time.perf_counter() - start)
        updating.append(seconds(lambda experience=experience: learner.update(experience)))  # type: ignore[misc]
    peaks.append(measure_limits([options.dtype], quick=options.quick).flops[options.dtype])
    evaluate_s, update_s, peak = (statistics.median(x[1:]) for x in (evaluating, updating, peaks))
    flops = forward_flops(options)
    return {
        "model": options.size,
        "dtype": options.dtype,
        "evaluate s": evaluate_s,
        "update s": update_s,
        "tokens/s": options.epochs * rollout.tokens.numel() / update_s,
        "GFLOP/s": 3 * flops * options.epochs / update_s / 1e9,
        "of the product's": f"{3 * flops * options.epochs / update_s / peak:.0%}",
        "peak MB": peak_mb(),
    }


def measure_memory(options: argparse.Namespace) -> Row:
    """Peak memory of a forward and backward pass, less what the program and the model's gradient take anyway."""
    model = GPT2(preset(options.size, VOCABULARIES[options.size]), device=device()).eval()
    model.checkpointing = options.loss != ACTIVATIONS  # so that the loss is what is seen
    tokens = torch.randint(model.config.vocab_size, (options.memory_rows, options.memory_length)).to(device())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    LOSSES[options.loss](model, tokens[:, :2]).backward()
    base = peak_mb()
    took = seconds(lambda: LOSSES[options.loss](model, tokens).backward())
    return {"loss": options.loss, "MB above the model": peak_mb() - base, "peak MB": peak_mb(), "s": took}


def full_logits(model: GPT2, tokens: Tensor) -> Tensor:
    """The usual loss."""
    logits = model.logits(model(tokens))[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def ours(model: GPT2, tokens: Tensor) -> Tensor:
    """The loss of pre-training and SFT."""
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False
    states = model.states(tokens, Layout.of(torch.ones_like(mask), read=before(mask), device=tokens.device))
    targets = tokens[:, 1:].flatten()
    weights = torch.ones(len(targets), device=tokens.device)
    with autocast(tokens.device, torch.float32):
        return weighted_nll_sum(states, model.wte.weight, targets, weights) / len(targets)


ACTIVATIONS = "ours, activations kept"
LOSSES = {"ours": ours, "full logits": full_logits, ACTIVATIONS: ours}


def peak_mb() -> float:
    """Largest memory so far in MiB: of the GPU where there is one, else resident."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(options: argparse.Namespace, **chosen: str) -> Row:
    """One measurement in a program of its own."""
    options = argparse.Namespace(**{**vars(options), **chosen})
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in PASSED]
    flags += ["--quick"] if options.quick else []
    return run_program([sys.executable, __file__, "--child", *flags]).line


PASSED = (
    *("size", "dtype", "loss", "threads", "repetitions", "rows", "prompt", "response", "epochs", "mini", "micro"),
    *("memory_rows", "memory_length"),
)
"""Options that a measurement's program is given."""


def main() -> None:
    """Measure everything, or one thing."""
    options_of = parser(__doc__ and __doc__.splitlines()[0], repetitions=1)
    options_of.add_argument("--sizes", type=words, default=["tiny", "mini_xl"])
    options_of.add_argument("--dtypes", type=words, default=["float32", "bfloat16"], help="bfloat16 where native")
    options_of.add_argument("--rows", type=int, default=32)
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    options_of.add_argument("--response", type=int, default=64, help="tokens of a response")
    options_of.add_argument("--epochs", type=int, default=4)
    options_of.add_argument("--mini", type=int, default=32, help="rows of an optimiser step")
    options_of.add_argument("--micro", type=int, default=16, help="rows of a forward pass")
    options_of.add_argument("--memory-rows", type=int, default=32)
    options_of.add_argument("--memory-length", type=int, default=512)
    options_of.add_argument("--size", choices=SIZES, default="mini_xl", help=argparse.SUPPRESS)
    options_of.add_argument("--dtype", choices=DTYPES, default="float32", help=argparse.SUPPRESS)
    options_of.add_argument("--loss", default="", help=argparse.SUPPRESS)
    options_of.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = options_of.parse_args()
    small = {"rows": 2, "prompt": 4, "response": 4, "epochs": 1, "mini": 2, "memory_rows": 2, "memory_length": 16}
    shrink(options, sizes=["tiny"], **small)
    if options.child:
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        print(json.dumps(measure_memory(options) if options.loss else measure_update(options)))
        return
    report = Report("learner", options)
    dtypes = [name for name in options.dtypes if compute_type(DTYPES[name], device()) == DTYPES[name]]
    shape = f"{options.rows} x ({options.prompt} + {options.response}) tokens, {options.epochs} epochs"
    title = f"update: {shape}, mini-batches of {options.mini} rows"
    report.table(title, [child(options, size=size, dtype=dtype) for size in options.sizes for dtype in dtypes])
    title = f"memory: {options.sizes[-1]}, {options.memory_rows} x {options.memory_length} tokens, float32"
    report.table(title, [child(options, size=options.sizes[-1], dtype="float32", loss=loss) for loss in LOSSES])
    report.close()


if __name__ == "__main__":
    main()
