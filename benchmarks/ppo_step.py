"""Whole PPO steps beside TRL's PPOTrainer: the same shapes, epochs, mini-batches and threads, each in its own program.

    python benchmarks/ppo_step.py --sizes tiny,mini_xl --mini-batches 1,4 --peer-python ~/peers/bin/python
    python benchmarks/ppo_step.py --checkpoint checkpoints/sft/default --reward-model checkpoints/reward_model/default \
        --prompts data/raw/prompts.txt --temperature 0.7 --peer-python ~/peers/bin/python

Without a checkpoint, random weights answer with rows of full length.  With one, both open the same folders, and
responses end by EOS; without ``--response`` the limit is three times the mean length that our engine measures, and the
columns say what the mean then was.  Policy, reference, reward model and critic are four networks on both sides.

Ours is ``launch/ppo.py``, with every role in its process unless ``--workers`` asks for Ray.  A program's figure is the
median of its iterations, the first not counted, and the programs take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from side_by_side import (  # isort: skip
    REPOSITORY,
    Report,
    Row,
    best,
    check_peer,
    numbers,
    parser,
    ratio,
    run_program,
    shrink,
    words,
)
import numpy as np
import yaml
from machine import DTYPES
from random_models import SIZES, write_models, write_prompts

from rlhf_ray.config import repository_path
from rlhf_ray.data.prompt_set import tokenise_prompts
from rlhf_ray.data.readers import read_prompts
from rlhf_ray.generation import Sampling, make_engine, row_uniforms
from rlhf_ray.generation.load import load_policy_with_tokenizer
from rlhf_ray.models.folders import model_folder
from rlhf_ray.tokenizer import TEMPLATES

Case = dict[str, Any]
"""What one comparison fixes: the folders and prompts, or the size, and the number of mini-batches."""


def settings(options: argparse.Namespace, case: Case, dtype: str, folder: Path) -> dict[str, Any]:
    """Our configuration of a case."""
    threads = options.threads if not options.workers else 1
    return {
        "checkpoints": str(folder / "checkpoints"),
        "policy": str(case["policy"]),
        "rewards": [{"source": str(case["reward"])}],
        "prompts": str(case["prompts"]),
        "template": case["template"],
        "num_rollout_workers": options.workers,
        "rollout_threads": threads,
        "scoring_threads": threads,
        "learner_threads": options.threads,
        "batch_size": options.batch,
        "total_steps": options.iterations + 1,
        "save_every": options.iterations + 1,
        "sample_rows": 0,
        "overwrite": True,
        "generation": {
            "temperature": options.temperature,
            "response_length": case["response"],
            "prompt_length": options.prompt,
            "shard_size": options.batch // max(1, options.workers),
            "dtype": dtype,
        },
        "ppo": {
            "epochs": options.epochs,
            "mini_batch_size": options.batch // case["mini_batches"],
            "micro_batch_size": min(options.micro, options.batch // case["mini_batches"]),
            "lr": 1e-6,
            "critic": "separate",
            "dtype": dtype,
        },
    }


def run_ours(options: argparse.Namespace, case: Case, dtype: str) -> Row:
    """One PPO run of ours, in the keys of the peer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "ppo.yaml"
        config.write_text(yaml.safe_dump(settings(options, case, dtype, folder)), encoding="utf-8")
        done = run_program([sys.executable, "launch/ppo.py", "--config", str(config)])
        lines = (folder / "checkpoints/ppo/default/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][1:]
    assert len(steps) == options.iterations
    median = {name: statistics.median(step[name] for step in steps) for name in steps[0] if name.startswith("time/")}
    return {
        "s_per_iteration": median["time/step"],
        **{f"s_{phase}": median[f"time/{phase}"] for phase in ("generate", "judge", "learn")},
        "response_tokens": statistics.mean(step["response_length/mean"] for step in steps),
        "peak_rss_mb": done.peak_mb,
    }


def run_theirs(options: argparse.Namespace, case: Case, dtype: str) -> Row:
    """One PPO run of TRL's."""
    command = [options.peer_python, str(REPOSITORY / "benchmarks/peers/trl_ppo.py"), "--dtype", dtype]
    for name in ("batch", "prompt", "epochs", "micro", "iterations", "threads", "temperature"):
        command += [f"--{name}", str(getattr(options, name))]
    command += ["--response", str(case["response"]), "--mini-batches", str(case["mini_batches"])]
    if options.checkpoint:
        command += ["--checkpoint", str(case["policy"]), "--reward-model", str(case["reward"])]
        command += ["--prompts", str(case["prompts"])]
    else:
        command += ["--size", case["model"]]
    return run_program(command).line


def compare(options: argparse.Namespace, case: Case) -> tuple[list[Row], Row]:
    """Both programs in every dtype, in turn: one row a program, and one for the best dtype of each."""
    runners = {"ours": run_ours, "TRL": run_theirs}
    found: dict[str, list[Row]] = {f"{side} {dtype}": [] for dtype in options.dtypes for side in runners}
    for _ in range(options.repetitions):
        for dtype in options.dtypes:
            for side, run in runners.items():
                found[f"{side} {dtype}"].append(run(options, case, dtype))
                taken = found[f"{side} {dtype}"][-1]["s_per_iteration"]
                print(f"{case['model']}, {side} {dtype}: {taken:.3f} s a step", file=sys.stderr, flush=True)
    times = {name: [run["s_per_iteration"] for run in runs] for name, runs in found.items()}
    named = {"model": case["model"], "mini-batches": case["mini_batches"], "response at most": case["response"]}
    rows: list[Row] = []
    for name, runs in found.items():
        side, dtype = name.split()
        median = {key: statistics.median(run[key] for run in runs) for key in COLUMNS}
        told = {title: float(median[key]) for key, title in COLUMNS.items()}
        theirs = times[f"TRL {dtype}"]
        rows.append({**named, "dtype": dtype, "": side, **told, "ratio": ratio(times[name], theirs)})
    ours, rival = best(times, "ours"), best(times, "TRL")
    compared = {"ours": ours.split()[1], "TRL": rival.split()[1], "ratio": ratio(times[ours], times[rival])}
    return rows, {**named, **compared}


COLUMNS = {
    "s_per_iteration": "s a step",
    "s_generate": "generate",
    "s_judge": "judge",
    "s_learn": "learn",
    "response_tokens": "mean response",
    "peak_rss_mb": "peak MB",
}


def natural_response(options: argparse.Namespace, policy: Path, template: str) -> int:
    """Three times the mean length of the policy's responses, within what its context leaves."""
    model, tokenizer, _ = load_policy_with_tokenizer(policy)
    room = model.config.n_positions - options.prompt
    prompts = tokenise_prompts(
        read_prompts(options.prompts), tokenizer, TEMPLATES[template], max_length=options.prompt, long_prompts="drop"
    )
    asked = [list(ids) for ids in prompts.token_ids[: 8 * options.batch]]
    uniforms = np.stack([row_uniforms(1, 0, row, room) for row in range(len(asked))])
    engine = make_engine(model, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    sampling = Sampling(max_new_tokens=room, temperature=options.temperature)
    lengths = [len(completion.tokens) for completion in engine.generate(asked, uniforms, sampling)]
    return min(room, round(3 * statistics.mean(lengths)))


def cases(options: argparse.Namespace, folder: Path) -> list[Case]:
    """One case a size, or the checkpoint's, for each number of mini-batches."""
    found: list[Case] = []
    if options.checkpoint:
        policy = model_folder(options.checkpoint)
        reward = model_folder(options.reward_model, field="reward-model")
        template = load_policy_with_tokenizer(policy)[2] or "chat"
        options.prompts = repository_path(options.prompts)
        shared = {"model": str(options.checkpoint), "policy": policy, "reward": reward, "prompts": options.prompts}
        response = options.response or natural_response(options, policy, template)
        found.append({**shared, "template": template, "response": response})
    else:
        for size in options.sizes:
            write_models(folder / size, size)
            prompts = folder / size / "prompts.txt"
            write_prompts(prompts, size, count=2 * options.batch, length=options.prompt)
            shared = {"model": size, "policy": folder / size / "policy", "reward": folder / size / "reward"}
            found.append({**shared, "prompts": prompts, "template": "plain", "response": options.response or 64})
    return [{**case, "mini_batches": count} for case in found for count in options.mini_batches]


def read_options() -> argparse.Namespace:
    """The command line, checked."""
    options_of = parser(__doc__ and __doc__.splitlines()[0])
    options_of.add_argument("--sizes", type=words, default=["mini_xl"], help=f"among {', '.join(SIZES)}")
    options_of.add_argument("--checkpoint", type=Path, help="policy to open, instead of random weights")
    options_of.add_argument("--reward-model", type=Path, help="its reward model, where the critic starts too")
    options_of.add_argument("--prompts", type=Path, help="its prompts, one a line")
    options_of.add_argument("--temperature", type=float, default=1.0)
    options_of.add_argument("--dtypes", type=words, default=["float32"], help=f"among {', '.join(DTYPES)}")
    options_of.add_argument("--mini-batches", type=numbers, default=[1, 4], help="optimiser steps of an epoch")
    options_of.add_argument("--batch", type=int, default=32, help="rows of a step")
    options_of.add_argument("--prompt", type=int, default=64, help="tokens of a prompt, at most with a checkpoint")
    options_of.add_argument("--response", type=int, default=0, help="tokens at most; 0: 64, or by a checkpoint's mean")
    options_of.add_argument("--epochs", type=int, default=4)
    options_of.add_argument("--micro", type=int, default=8, help="rows of one forward pass")
    options_of.add_argument("--iterations", type=int, default=2, help="counted steps of one program")
    options_of.add_argument("--workers", type=int, default=0, help="our rollout workers; 0 is one process")
    options_of.add_argument("--peer-python", default=sys.executable, help="interpreter that has TRL")
    options = options_of.parse_args()
    if options.checkpoint and not (options.reward_model and options.prompts):
        options_of.error("--checkpoint needs --reward-model and --prompts")
    shrink(options, sizes=["tiny"], mini_batches=[2], batch=4, prompt=8, response=8, iterations=1, repetitions=1)
    return options


def main() -> None:
    """Compare every case."""
    options = read_options()
    check_peer(options.peer_python, ["trl", "transformers", "datasets"])
    report = Report("ppo_step", options)
    with tempfile.TemporaryDirectory() as folder:
        compared = [compare(options, case) for case in cases(options, Path(folder))]
    lengths = f"prompts of {options.prompt}, {options.epochs} epochs, micro-batches of {options.micro}"
    report.table(f"{options.batch} rows, {lengths}", [row for rows, _ in compared for row in rows])
    if len(options.dtypes) > 1:
        report.table("best dtype of each", [row for _, row in compared])
    report.close()


if __name__ == "__main__":
    main()
