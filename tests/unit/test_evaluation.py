"""Distinct-n, win-rates, judges, perplexity and the before/after table."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from small_folders import LINES, make_policy, make_reward_model, small_tokenizer

from rlhf_ray.config import EvaluateConfig
from rlhf_ray.data.rows import ChatRow, PromptRow, TextRow
from rlhf_ray.evaluation.answers import Answers
from rlhf_ray.evaluation.compare import Comparison, compare, pick, show, summary, win_rate
from rlhf_ray.evaluation.distinct import distinct_n
from rlhf_ray.evaluation.intervals import intervals, of_mean, wilson
from rlhf_ray.evaluation.judges import find_judge
from rlhf_ray.evaluation.perplexity import measure, perplexities, read_rows, show_perplexities, to_passages
from rlhf_ray.functions import load_function
from rlhf_ray.generation.load import load_policy_with_tokenizer
from rlhf_ray.models.hf_weights import load_reward_model
from rlhf_ray.tokenizer import TEMPLATES
from rlhf_ray.types import Message

JUDGE = """
def length(prompt, response, messages, wanted, **fields):
    assert messages[-1] == {"role": "user", "content": prompt}
    return float(wanted) * len(response)

def broken(**fields):
    return float("nan")

NUMBER = 3
"""


def test_distinct_n() -> None:
    assert distinct_n([["a", "b", "a", "b"], ["a", "b"]]) == 2 / 4
    assert distinct_n([[1, 2, 3]], n=1) == 1.0
    assert distinct_n([["one"], []]) == 0.0


def test_win_rate_counts_ties_half() -> None:
    win = win_rate([2, 1, 0, 5], [1, 1, 1, 1])
    assert win.rate == (2 + 0.5) / 4


def test_wilson_interval() -> None:
    win = win_rate([1] * 70 + [0] * 30, [0] * 70 + [1] * 30)
    assert (win.rate, win.low, win.high) == pytest.approx((0.7, 0.6042, 0.7811), abs=1e-4)
    certain = win_rate([1, 1], [0, 0])
    assert certain.high == pytest.approx(1) and certain.low == pytest.approx(0.3424, abs=1e-4)


def test_intervals_of_means_shares_and_pairs() -> None:
    def answers(judged: tuple[float, ...], finished: tuple[bool, ...]) -> Answers:
        return Answers(
            texts=("a",) * 4, lengths=(3, 4, 3, 4), finished=finished, kl=(0.0,) * 4, judged=judged, scores=None
        )

    before = answers((1.0, 2.0, 3.0, 4.0), (True, True, False, False))
    after = answers((2.0, 3.0, 4.0, 5.0), (True,) * 4)
    found = intervals(before, after)
    half = 1.959964 * statistics.stdev((1, 2, 3, 4)) / 2
    assert found["baseline"]["judge"] == pytest.approx((2.5 - half, 2.5 + half))
    assert found["difference"]["judge"] == (1.0, 1.0)  # every answer is better by one, however unlike the prompts
    assert found["baseline"]["eos_rate"] == wilson(0.5, 4) and found["policy"]["eos_rate"][1] == pytest.approx(1)
    assert found["difference"]["eos_rate"][0] < 0.5 < found["difference"]["eos_rate"][1]
    assert all("reward" not in of for of in found.values())
    assert of_mean([1.0]) is None


def test_picked_prompts_are_spread_over_the_file() -> None:
    rows = [PromptRow(prompt=(Message(role="user", content=str(i)),)) for i in range(10)]
    assert [row.prompt[0].content for row in pick(rows, 4)] == ["0", "2", "5", "7"]
    assert pick(rows, 10) == pick(rows, 99) == rows


def prompt_row(text: str, **fields: object) -> PromptRow:
    return PromptRow(prompt=(Message(role="user", content=text),), fields=fields)


def test_a_user_judge_gets_the_rows_fields(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(JUDGE, encoding="utf-8")
    judge = find_judge(f"{file}:length")
    assert judge is not None
    assert judge(prompt_row("hi", wanted=2, other="x"), "four") == 8.0
    broken = find_judge(f"{file}:broken")
    assert broken is not None
    with pytest.raises(ValueError, match="must return a finite number"):
        broken(prompt_row("hi"), "four")


def test_named_judges() -> None:
    assert find_judge("none") is None
    with pytest.raises(ValueError, match="judge = 'poet'; choose demo, none or"):
        find_judge("poet")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:absent", r"has no function absent \(it has: broken, length\)"),
        ("{file}:NUMBER", "has no function NUMBER"),
        ("{file}:", "not of the form"),
        ("{file}", "not of the form"),
        ("nowhere.py:f", r"there is no file .*nowhere\.py"),
    ],
)
def test_wrong_functions_are_refused_by_field(tmp_path: Path, spec: str, message: str) -> None:
    file = tmp_path / "judge.py"
    file.write_text(JUDGE, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_function(spec.format(file=file), field="reward")
    assert str(error.value).startswith("reward = ")


def chat_row(*contents: str) -> ChatRow:
    roles = ["user", "assistant"] * len(contents)
    return ChatRow(messages=tuple(Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)))


def plain_nll(folder: Path, ids: list[int], targets: list[bool]) -> tuple[float, int]:
    """Sum of -log p over the targets, from whole logits, and their number."""
    policy, _, _ = load_policy_with_tokenizer(folder)
    logits = policy.logits(policy(torch.tensor([ids])))[0]  # (T, V)
    nll = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    mask = torch.tensor(targets[1:])
    return float(nll[mask].sum()), int(mask.sum())


def test_perplexity_of_dialogues_counts_the_assistants_tokens_alone(tmp_path: Path) -> None:
    folder = make_policy(tmp_path / "a")
    policy, tokenizer, _ = load_policy_with_tokenizer(folder)
    rows = [chat_row("hello", "The capital", "and", "is Oster"), chat_row("x", "y")]
    sums = [plain_nll(folder, *TEMPLATES["chat"].conversation_ids(tokenizer, row.messages)) for row in rows]
    found = measure(policy, to_passages(rows, tokenizer, TEMPLATES["chat"], 64), batch_size=2)
    total, tokens = sum(s for s, _ in sums), sum(n for _, n in sums)
    assert found.tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_perplexity_of_text_predicts_every_token_once(tmp_path: Path) -> None:
    policy, tokenizer, _ = load_policy_with_tokenizer(make_policy(tmp_path / "a"))
    text = TextRow(text=LINES[0] * 9)
    passages = to_passages([text], tokenizer, TEMPLATES["chat"], 64)
    expected = len(tokenizer.encode(text.text)) + 1  # EOS
    assert expected > 64
    assert measure(policy, passages, batch_size=1).tokens == expected


def test_uniform_model_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    policy, tokenizer, _ = load_policy_with_tokenizer(make_policy(tmp_path / "a"))
    with torch.no_grad():
        policy.wte.weight.zero_()
    passages = to_passages([chat_row("a", "b c d")], tokenizer, TEMPLATES["chat"], 64)
    assert measure(policy, passages, batch_size=1).perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_long_dialogues_are_cut_and_counted() -> None:
    tokenizer = small_tokenizer()
    passages = to_passages([chat_row("a", "b" * 200), chat_row("a", "b")], tokenizer, TEMPLATES["chat"], 32)
    assert passages.cut == 1
    assert max(row.length for row in passages.rows) == 32


def test_rows_are_recognised(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "one\n\ntwo"),
        ("b.jsonl", '{"text": "one"}\n{"text": "two"}'),
        ("c.jsonl", '{"prompt": "q", "response": "a"}'),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_rows(tmp_path / "a.txt") == read_rows(tmp_path / "b.jsonl")
    assert read_rows(tmp_path / "c.jsonl") == [chat_row("q", "a")]


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Two random policies, a random reward model, five prompts and a judge."""
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    rows = [{"prompt": f"What is {i}?" + "?" * (60 * (i == 3)), "wanted": 1} for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return EvaluateConfig(
        policy=make_policy(tmp_path / "policy", seed=1),
        baseline=make_policy(tmp_path / "baseline"),
        reward_model=make_reward_model(tmp_path / "reward_model"),
        prompts=tmp_path / "prompts.jsonl",
        judge=f"{tmp_path / 'judge.py'}:length",
        response_length=10,
        prompt_length=40,
        batch_size=2,
        device="cpu",
        examples=2,
        output=tmp_path / "out" / "evaluation.json",
    )


def test_comparison_measures_each_side(config: EvaluateConfig) -> None:
    result = compare(config)
    assert len(result.prompts) == 5 and result.cut == 1
    for side in (result.baseline, result.policy):
        assert side.judged == tuple(float(len(text)) for text in side.texts)
        assert all(1 <= length <= 10 for length in side.lengths)
        assert all(length == 10 or done for length, done in zip(side.lengths, side.finished, strict=True))
    assert result.baseline.kl == (0.0,) * 5
    assert result.policy.texts != result.baseline.texts
    assert compare(config) == result


def test_sequence_kl_and_score_of_a_row(config: EvaluateConfig) -> None:
    """The first row's KL and score, recomputed from whole logits."""
    from rlhf_ray.generation import Sampling, make_engine, row_uniforms

    result = compare(config)
    policy, tokenizer, _ = load_policy_with_tokenizer(config.policy)
    prompt = TEMPLATES["chat"].prompt_ids(tokenizer, result.prompts[0].prompt)
    engine = make_engine(policy, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
    response = engine.generate([prompt], row_uniforms(0, 0, 0, 10)[None], Sampling(max_new_tokens=10))[0].tokens
    assert tokenizer.decode(response) == result.policy.texts[0]
    ids, targets = prompt + response, [False] * len(prompt) + [True] * len(response)
    kl = plain_nll(config.baseline, ids, targets)[0] - plain_nll(config.policy, ids, targets)[0]
    assert result.policy.kl[0] == pytest.approx(kl, abs=1e-4)
    assert config.reward_model is not None and result.policy.scores is not None
    scorer = load_reward_model(config.reward_model)
    score = scorer(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    assert result.policy.scores[0] == pytest.approx(score.item(), abs=1e-5)


def test_a_policy_against_itself_ties(config: EvaluateConfig) -> None:
    result = compare(config.model_copy(update={"policy": config.baseline}))
    assert result.policy == result.baseline
    assert result.win_rate is not None and result.win_rate.rate == 0.5


def test_the_table_and_its_file(config: EvaluateConfig, capsys: pytest.CaptureFixture[str]) -> None:
    result = compare(config)
    show(result, config)
    printed = capsys.readouterr().out
    assert "Before and after on 5 held-out prompts (1 of them cut from the left)" in printed
    assert f"judge's win-rate of the policy: {win(result):.3f}" in printed
    assert printed.count("What is ") == config.examples
    assert config.output is not None
    saved = json.loads(config.output.read_text(encoding="utf-8"))
    assert saved["policy"] == summary(result.policy)
    assert saved["win_rate"]["rate"] == win(result)
    low, high = saved["intervals"]["policy"]["length"]
    assert low <= saved["policy"]["length"] <= high
    assert [pair["policy"] for pair in saved["samples"]] == list(result.policy.texts)


def win(comparison: Comparison) -> float:
    assert comparison.win_rate is not None
    return comparison.win_rate.rate


def test_without_judge_and_reward_model_their_rows_are_left_out(config: EvaluateConfig) -> None:
    result = compare(config.model_copy(update={"judge": "none", "reward_model": None}))
    assert result.win_rate is None
    assert set(summary(result.policy)) == {"kl", "length", "eos_rate", "distinct_2"}


def test_greedy_samples_are_compared_too(config: EvaluateConfig) -> None:
    result = compare(config.model_copy(update={"temperature": 0.0}))
    assert result.baseline.kl == (0.0,) * 5
    assert all(math.isfinite(kl) and kl != 0 for kl in result.policy.kl)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response_length", 64, "response_length = 64 leaves no room"),
        ("prompts", Path("nowhere.jsonl"), "nowhere.jsonl"),
        ("baseline", Path("nowhere"), "baseline = nowhere: no model there"),
        ("reward_model", Path("nowhere"), "reward_model = nowhere: no model there"),
    ],
)
def test_what_is_missing_is_refused_by_name(config: EvaluateConfig, field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(config.model_copy(update={field: value}))


def test_perplexity_table(config: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "hello", "response": "The capital is Oster"}\n', encoding="utf-8")
    asked = config.model_copy(update={"perplexity": [file]})
    found = perplexities(asked)[str(file)]
    show_perplexities({str(file): found}, asked)
    assert f"{found['policy'].perplexity:.4g}" in capsys.readouterr().out
    assert found["policy"].tokens == found["baseline"].tokens
    assert config.output is not None
    saved = json.loads(config.output.read_text(encoding="utf-8"))[str(file)]
    assert saved == {name: side.perplexity for name, side in found.items()}
