"""Reward modelling: pair loss, padding, normalisation, metrics and the rankers beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from small_folders import make_policy

from rlhf_ray.config import RewardModelConfig
from rlhf_ray.models.hf_weights import load_reward_model
from rlhf_ray.objectives import pair_metrics
from rlhf_ray.objectives.baselines import BagOfWords, length_baseline, words
from rlhf_ray.objectives.reward_model import RewardModel, pad_right
from rlhf_ray.runtime.train_step import World, accumulate, gather_facts, step_input
from rlhf_ray.shortage import micro_batch
from rlhf_ray.workers.snapshot import copy_of_module

CPU = torch.device("cpu")
PAIRS = [
    {"prompt": "Where is it?", "chosen": "In the valley.", "rejected": "No"},
    {"prompt": "What is the capital?", "chosen": "Oster, of course. Thank you!", "rejected": "What is it?"},
    {"prompt": "Thank you", "chosen": "You", "rejected": "the very of is the", "margin": 0.5},
]


@pytest.fixture
def objective(tmp_path: Path) -> RewardModel:
    make_policy(tmp_path / "policy")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    return RewardModel(
        RewardModelConfig(
            data=[tmp_path / "pairs.jsonl"],
            policy=tmp_path / "policy",
            max_length=64,
            held_out=0,
            normalise_samples=64,
            response_length=16,
            device="cpu",
        )
    )


def test_loss_is_the_mean_of_log_sigmoids_whatever_the_micro_batch(objective: RewardModel) -> None:
    torch.manual_seed(0)
    model, rows = objective.build(CPU), list(objective.dataset().train)
    scores = [[float(model(*pad_right([tokens])).detach()) for tokens in (row.chosen, row.rejected)] for row in rows]
    margins = torch.tensor([chosen - rejected for chosen, rejected in scores]) - torch.tensor([0.0, 0.0, 0.5])
    for size in (1, 2, 3):
        loss = accumulate(objective, model, step_input(objective, rows, World(), micro_batch(size)), World())
        assert float(loss) == pytest.approx(float(-F.logsigmoid(margins).mean()), abs=1e-5)


def test_score_does_not_depend_on_padding_or_neighbours(objective: RewardModel) -> None:
    torch.manual_seed(0)
    model, rows = objective.build(CPU).eval(), list(objective.dataset().train)
    together = gather_facts(objective, model, rows, World(), micro_batch(3))
    alone = gather_facts(objective, model, rows, World(), micro_batch(1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    tokens, mask = pad_right([rows[0].chosen])
    for left, right, token in ((0, 7, 5), (7, 0, 5), (3, 4, 9)):
        padded = F.pad(tokens, (left, right), value=token), F.pad(mask, (left, right), value=False)
        assert float(model(*padded).detach()) == pytest.approx(float(together[0, 0]), abs=1e-5)


def test_pairs_hold_the_same_prompt_and_end_with_eos(objective: RewardModel) -> None:
    template, tokenizer = objective.template, objective.tokenizer
    prompts = [template.prompt_ids(tokenizer, pair.prompt) for pair in objective._pairs()[0]]
    for row, prompt in zip(objective.dataset().train, prompts, strict=True):
        assert row.chosen[-1] == row.rejected[-1] == tokenizer.eos_id
        assert row.chosen[: len(prompt)].tolist() == row.rejected[: len(prompt)].tolist() == prompt


def test_long_prompts_are_cut_on_the_left_for_both_and_long_answers_dropped(objective: RewardModel) -> None:
    path = objective.config.data[0].with_name("long.jsonl")
    rows = [
        {"prompt": "What is the capital of the valley? " * 9, "chosen": "Oster", "rejected": "Thank you very much!"},
        {"prompt": "Oster?", "chosen": "What is the capital of the valley? " * 9, "rejected": "Oster"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = RewardModel(objective.config.model_copy(update={"data": [path]})).dataset()
    assert (dataset.counts["cut"], dataset.counts["dropped as too long"]) == (1, 1)
    (pair,) = dataset.train
    assert max(len(pair.chosen), len(pair.rejected)) == 64 and pair.chosen[0] == objective.tokenizer.bos_id
    common = min(len(pair.chosen), len(pair.rejected)) - 8
    assert pair.chosen[:common].tolist() == pair.rejected[:common].tolist()


def test_saved_model_has_mean_0_and_deviation_1_on_the_policys_samples(objective: RewardModel, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = objective.build(CPU)
    with torch.no_grad():
        model.score.weight.mul_(3.0)
    raw = pad_right([objective.dataset().train[0].chosen])
    before = model(*raw).item()
    objective.prepare(CPU, torch.float32)
    copy = copy_of_module(model, model)
    objective.finish(model, copy)
    objective.save(copy, tmp_path / "saved")
    assert model(*raw).item() == before  # training goes on with raw scores
    saved = load_reward_model(tmp_path / "saved").eval()
    mean, std = pair_metrics.mean_and_std(objective.score(saved, objective._samples))
    assert mean == pytest.approx(0.0, abs=1e-5) and std == pytest.approx(1.0, abs=1e-5)
    expected = float(saved.reward_gain) * before + float(saved.reward_bias)
    assert saved(*raw).item() == pytest.approx(expected, abs=1e-5)

    again = objective.load(tmp_path / "saved", CPU)
    assert again(*raw).item() == before

    report = objective.report(tmp_path / "saved", torch.zeros(0, 2), objective.dataset(), CPU)
    assert abs(report.metrics["eval/fresh_mean"]) < 3 * report.metrics["eval/fresh_standard_error"]
    assert report.metrics["eval/fresh_std"] == pytest.approx(1.0, abs=0.5)


def test_the_two_draws_of_samples_differ_and_repeat(objective: RewardModel) -> None:
    objective.prepare(CPU, torch.float32)
    assert objective._sampler is not None
    assert objective._sampler.sample(64, draw=0) == objective._samples
    assert objective._sampler.sample(64, draw=1) != objective._samples


def test_accuracy_counts_ties_as_wrong() -> None:
    assert pair_metrics.accuracy(torch.tensor([1.0, 0.0, -1.0, 2.0])) == 0.5


def test_deciles_go_from_the_smallest_margin_to_the_largest() -> None:
    margins = torch.tensor([-0.1, -0.2, 0.3, -0.4, 5.0, 6.0, 7.0, 8.0, 9.0, -10.0])
    assert pair_metrics.accuracy_by_decile(margins, bins=5) == [0.0, 0.5, 1.0, 1.0, 0.5]
    assert pair_metrics.accuracy_by_decile(margins[:3]) == [0.0, 0.0, 1.0]


def test_calibration_of_known_margins() -> None:
    margin = torch.log(torch.tensor(3.0))  # confidence 0.75
    bins = pair_metrics.calibration(torch.stack([margin, margin, -margin, torch.tensor(0.0)]), bins=5)
    assert [b.pairs for b in bins] == [1, 3]
    assert bins[0].confidence == 0.5 and bins[0].accuracy == 0.0
    assert bins[1].confidence == pytest.approx(0.75) and bins[1].accuracy == pytest.approx(2 / 3)
    assert pair_metrics.expected_calibration_error(bins) == pytest.approx((0.5 + 3 * (0.75 - 2 / 3)) / 4)


def test_pair_loss_of_equal_scores_is_log_2() -> None:
    assert pair_metrics.pair_loss(torch.zeros(4)) == pytest.approx(0.693147, abs=1e-6)


def test_length_baseline_takes_the_better_rule_of_the_training_pairs() -> None:
    train = [("a", "bbb"), ("a", "bb"), ("aaa", "b")]
    result = length_baseline(train, [("a", "bb"), ("aa", "bb"), ("aaa", "b"), ("a", "bbb")])
    assert (result.prefers, result.accuracy, result.chosen_is_longer) == ("shorter", 0.5, 0.25)


def test_words_are_lower_case_and_keep_punctuation() -> None:
    assert words("The cat. THE dog!") == {"the": 2, "cat": 1, ".": 1, "dog": 1, "!": 1}


def test_bag_of_words_is_logistic_regression_on_count_differences() -> None:
    rng = np.random.default_rng(0)
    vocabulary = ["good", "kind", "the", "bad", "rude", "a"]
    quality = np.array([1.0, 0.7, 0.0, -1.0, -0.7, 0.1])
    pairs = []
    for _ in range(300):
        counts = rng.integers(0, 3, size=(2, 6))
        texts = [" ".join(w for w, c in zip(vocabulary, row, strict=True) for _ in range(c)) for row in counts]
        wins = rng.random() < 1 / (1 + np.exp(-(counts[0] - counts[1]) @ quality))
        pairs.append((texts[0], texts[1]) if wins else (texts[1], texts[0]))
    ranker = BagOfWords(pairs, l2=2.0)
    features = np.array([[words(a)[w] - words(b)[w] for w in sorted(vocabulary)] for a, b in pairs], dtype=float)
    mirrored = np.vstack([features, -features])  # sklearn wants both classes; each pair twice halves C
    labels = np.repeat([1, 0], len(pairs))
    peer = LogisticRegression(C=0.25, fit_intercept=False, tol=1e-10, max_iter=1000).fit(mirrored, labels)
    np.testing.assert_allclose(ranker.weights.numpy(), peer.coef_[0], atol=1e-4)
    assert ranker.accuracy([("good kind", "bad"), ("rude", "kind")]) == 0.5
    assert ranker.accuracy([("unknown", "words")]) == 0.0  # a tie is wrong
