"""One PPO run of TRL's PPOTrainer: prints one JSON line with seconds per iteration and their split.

    python benchmarks/peers/trl_ppo.py --size mini_xl --batch 32 --prompt 64 --response 64 --epochs 4 --mini-batches 1 \
        --micro 8 --iterations 3 --threads 2
    python benchmarks/peers/trl_ppo.py --checkpoint checkpoints/sft/default/step_000100 --prompts data/raw/prompts.txt

Without a checkpoint: random weights, random prompts, every response of full length.  With one: its prompts and its
tokenizer, and responses that end by EOS; the trainer computes on the padding behind them, as it always does.  Needs
the packages of ``benchmarks/requirements.txt``.  Iteration 1 is a warm-up and not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")

import torch
import trl.experimental.ppo.ppo_trainer as trainer_module
from datasets import Dataset
from hf_generate import SIZES
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Phases(TrainerCallback):
    """Adds up the seconds of generating, of judging (until the first micro-batch), and of learning."""

    def __init__(self) -> None:
        self.iterations: list[dict[str, float]] = []
        self.tokens: list[float] = []
        self._marks: dict[str, float] = {}

    def mark(self, name: str) -> None:
        """Note the time at which something happened, once an iteration."""
        self._marks.setdefault(name, time.perf_counter())

    def watch(self, trainer: PPOTrainer, pad_id: int) -> None:
        """Mark the end of generation and the first micro-batch."""
        generate, accumulate = trainer_module.batch_generation, trainer.accelerator.accumulate

        def timed_generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
            out = generate(model, queries, *rest)
            self.mark("generated")
            self.tokens.append(response_tokens(out[0][:, queries.shape[1] :], trainer.stop_token_id, pad_id))
            return out

        def marked_accumulate(*modules: Any) -> Any:
            self.mark("judged")
            return accumulate(*modules)

        trainer_module.batch_generation = timed_generation
        trainer.accelerator.accumulate = marked_accumulate

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first iteration begins."""
        self.mark("begun")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An iteration is over, and the next begins."""
        now, marks = time.perf_counter(), self._marks
        self.iterations.append(
            {
                "iteration": now - marks["begun"],
                "generate": marks["generated"] - marks["begun"],
                "judge": marks["judged"] - marks["generated"],
                "learn": now - marks["judged"],
            }
        )
        self._marks = {"begun": now}


def response_tokens(responses: torch.Tensor, stop_id: int | None, pad_id: int) -> float:
    """Mean length of responses (B, T), each up to its EOS."""
    if stop_id is None:
        return float(responses.shape[1])
    ended = (responses == stop_id).int().cumsum(1) - (responses == stop_id).int() > 0
    return float((~ended & (responses != pad_id)).sum(1).float().mean())


def random_world(options: argparse.Namespace) -> tuple[dict[str, Any], PreTrainedTokenizerFast, list[list[int]]]:
    """Four networks of one size with random weights, a tokenizer, and prompts of one length."""
    layers, width, heads, vocab, positions = SIZES[options.size]
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=vocab - 2,
        eos_token_id=vocab - 2,
        pad_token_id=vocab - 1,
        num_labels=1,
    )
    torch.manual_seed(0)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reference.load_state_dict(policy.state_dict())
    reward, value = GPT2ForSequenceClassification(config), GPT2ForSequenceClassification(config)
    names = {f"w{i}": i for i in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="w0")),
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
    )
    prompts = [torch.randint(0, vocab - 2, (options.prompt,)).tolist() for _ in range(options.batch * 2)]
    networks = {"model": policy, "ref_model": reference, "reward_model": reward, "value_model": value}
    return networks, tokenizer, prompts


def opened_world(options: argparse.Namespace) -> tuple[dict[str, Any], PreTrainedTokenizerFast, list[list[int]]]:
    """The networks and the tokenizer of folders, and prompts in the tokenizer's chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.checkpoint, padding_side="left")
    policy = GPT2LMHeadModel.from_pretrained(options.checkpoint)
    policy.generation_config.eos_token_id = tokenizer.eos_token_id
    scorer = options.reward_model or options.checkpoint
    reward = GPT2ForSequenceClassification.from_pretrained(scorer, num_labels=1)
    prompts = []
    for line in filter(None, options.prompts.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line) if line.startswith("{") else {"prompt": line}
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) <= options.prompt:
            prompts.append(ids)
    if not prompts:
        raise SystemExit(f"error: no prompt of {options.prompts} has at most {options.prompt} tokens")
    prompts *= -(-options.batch // len(prompts))  # the trainer waits for ever for a batch that is never full
    networks = {
        "model": policy,
        "ref_model": copy.deepcopy(policy),
        "reward_model": reward,
        "value_model": copy.deepcopy(reward),
    }
    return networks, tokenizer, prompts


def make_trainer(options: argparse.Namespace, phases: Phases) -> PPOTrainer:
    """The trainer, with early stopping, evaluation, reports and checkpoints off.

    A batch of this trainer has device batch x accumulation rows, and the optimiser steps every accumulation-th forward
    pass.  So one mini-batch may be accumulated, but of several each is one forward pass.
    """
    networks, tokenizer, prompts = opened_world(options) if options.checkpoint else random_world(options)
    at_once = options.micro if options.mini_batches == 1 else options.batch
    rows = [{"input_ids": ids} for ids in prompts]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=options.batch // at_once,
            num_mini_batches=options.mini_batches,
            num_ppo_epochs=options.epochs,
            total_episodes=options.batch * (options.iterations + 1),
            response_length=options.response,
            local_rollout_forward_batch_size=options.batch,
            num_sample_generations=0,
            stop_token="eos" if options.checkpoint else None,
            temperature=options.temperature,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=options.dtype == "bfloat16",
            disable_tqdm=True,
            logging_steps=10**6,
            learning_rate=1e-6,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:2]),
        callbacks=[phases],
        **networks,
    )
    sizes = (trainer.args.local_batch_size, trainer.args.local_mini_batch_size)
    assert sizes == (options.batch, options.batch // options.mini_batches), sizes
    phases.watch(trainer, tokenizer.pad_token_id)
    return trainer


def main() -> None:
    """Train, and print one line of JSON."""
    parser = argparse.ArgumentParser(description="TRL's PPOTrainer")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    counts = {"batch": 32, "prompt": 64, "response": 64, "epochs": 4, "mini-batches": 1, "micro": 32}
    for name, default in {**counts, "iterations": 3, "threads": 2}.items():
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--checkpoint", type=Path, help="policy's folder, instead of random weights")
    parser.add_argument("--reward-model", type=Path, help="its reward model's; unset puts a new head on the policy")
    parser.add_argument("--prompts", type=Path, help="one a line, as text or JSON; those over --prompt are dropped")
    options = parser.parse_args()
    if options.checkpoint and not options.prompts:
        parser.error("--checkpoint needs --prompts")
    mini = options.batch // options.mini_batches
    options.micro = min(options.micro, mini) if options.mini_batches == 1 else mini
    torch.set_num_threads(options.threads)
    phases = Phases()
    with contextlib.redirect_stdout(sys.stderr):
        make_trainer(options, phases).train()
    counted = phases.iterations[1:]
    median = {name: statistics.median(found[name] for found in counted) for name in counted[0]}
    told = {f"s_{name}": round(median[name], 4) for name in ("generate", "judge", "learn")}
    result = {
        "peer": "trl",
        **{name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "s_per_iteration": round(median["iteration"], 4),
        **told,
        "s_rest": round(median["iteration"] - median["generate"], 4),
        "rows_per_s": round(options.batch / median["iteration"], 2),
        "response_tokens": round(statistics.mean(phases.tokens[1:]), 1),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
