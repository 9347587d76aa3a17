"""Next-token objectives: the loss is cross-entropy, packing changes nothing, weights mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_folders import make_policy, small_model, small_tokenizer
from torch import Tensor

from rlhf_ray.config import PretrainConfig, SFTConfig
from rlhf_ray.models import GPT2
from rlhf_ray.objectives.language_model import LanguageModel, windows
from rlhf_ray.objectives.next_token import Document, TokenRow, to_rows
from rlhf_ray.objectives.sft import SFT
from rlhf_ray.runtime.train_step import World, accumulate, step_input
from rlhf_ray.shortage import micro_batch
from rlhf_ray.tokenizer import Tokenizer

CHATS = [
    {"prompt": "What is the capital?", "response": "Oster, of course."},
    {"prompt": "Thank you", "response": "You are welcome."},
    {"prompt": "Where is it?", "response": "In the valley, of course. Thank you very much!"},
    {"prompt": "the valley", "response": "is"},
]


@pytest.fixture
def sft(tmp_path: Path) -> SFT:
    make_policy(tmp_path / "policy")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
    return SFT(
        SFTConfig(data=[tmp_path / "chats.jsonl"], policy=tmp_path / "policy", max_length=64, held_out=0, device="cpu")
    )


def with_config(objective: SFT, **changes: object) -> SFT:
    return SFT(objective.config.model_copy(update=changes))


def gradient(model: GPT2) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def step(objective: SFT, rows: list[TokenRow], *, micro_batch_size: int = 99) -> tuple[float, Tensor]:
    """Loss and gradient of one optimiser step over the rows."""
    model = objective.build(torch.device("cpu"))
    loss = accumulate(objective, model, step_input(objective, rows, World(), micro_batch(micro_batch_size)), World())
    return float(loss), gradient(model)


@pytest.mark.parametrize("completion_only", [True, False])
def test_loss_and_gradient_are_those_of_cross_entropy(sft: SFT, completion_only: bool) -> None:
    objective = with_config(sft, completion_only=completion_only)
    loss, grad = step(objective, list(objective.dataset().train))
    model, tokenizer = objective.build(torch.device("cpu")), objective.tokenizer
    terms = []
    for chat in CHATS:
        response = [*tokenizer.encode(chat["response"]), tokenizer.eos_id]
        prompt = [tokenizer.bos_id, tokenizer.user_id, *tokenizer.encode(chat["prompt"]), tokenizer.assistant_id]
        ids = torch.tensor([prompt + response])
        logits = model.logits(model(ids))[0, :-1]
        first = len(prompt) - 1 if completion_only else 0
        terms.append(F.cross_entropy(logits[first:], ids[0, 1 + first :], reduction="none"))
    expected = torch.cat(terms).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad, gradient(model), atol=1e-5, rtol=1e-4)


def test_packed_equals_unpacked_in_loss_and_gradient(sft: SFT) -> None:
    packed, unpacked = with_config(sft, packing=True).dataset(), with_config(sft, packing=False).dataset()
    assert len(packed.train) < len(unpacked.train) == len(CHATS)
    loss, grad = step(sft, list(packed.train))
    other_loss, other_grad = step(sft, list(unpacked.train))
    assert loss == pytest.approx(other_loss, rel=1e-6)
    torch.testing.assert_close(grad, other_grad, atol=1e-6, rtol=1e-4)
    facts = [objective_facts(sft, rows).sum(0) for rows in (packed.train, unpacked.train)]
    torch.testing.assert_close(facts[0], facts[1], atol=1e-5, rtol=1e-6)


def objective_facts(objective: SFT, rows: object) -> Tensor:
    assert isinstance(rows, list)
    model = objective.build(torch.device("cpu"))
    with torch.no_grad():
        return objective.facts(model, objective.collate(rows))


def test_micro_batch_size_changes_nothing(sft: SFT) -> None:
    rows = list(with_config(sft, packing=False).dataset().train)
    loss, grad = step(sft, rows)
    for size in (1, 2, 3):
        other_loss, other_grad = step(sft, rows, micro_batch_size=size)
        assert other_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other_grad, grad, atol=1e-6, rtol=1e-4)


def test_shares_of_ranks_add_up_to_the_whole(sft: SFT) -> None:
    rows = list(with_config(sft, packing=False).dataset().train)
    loss, grad = step(sft, rows)
    model, losses = sft.build(torch.device("cpu")), []
    for rank in range(3):
        world = World(rank=rank, size=3)
        losses.append(float(accumulate(sft, model, step_input(sft, rows, world, micro_batch(1)), world)))
    assert sum(losses) == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient(model), grad, atol=1e-6, rtol=1e-4)


def weighted(sft: SFT, weights: list[float]) -> SFT:
    path = sft.config.data[0].with_name("weighted.jsonl")
    rows = [{**row, "weight": weight} for row, weight in zip(CHATS, weights, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return with_config(sft, data=[path])


def test_equal_weights_of_7_are_weights_of_1(sft: SFT) -> None:
    loss, grad = step(sft, list(sft.dataset().train))
    other_loss, other_grad = step(sft, list(weighted(sft, [7.0] * 4).dataset().train))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_grad, grad, atol=1e-6, rtol=1e-4)


def test_a_weight_of_0_removes_the_row(sft: SFT) -> None:
    alone = with_config(sft, data=[sft.config.data[0].with_name("two.jsonl")])
    alone.config.data[0].write_text("".join(json.dumps(row) + "\n" for row in CHATS[:2]), encoding="utf-8")
    loss, grad = step(sft, list(alone.dataset().train))
    other_loss, other_grad = step(sft, list(weighted(sft, [1.0, 1.0, 0.0, 0.0]).dataset().train))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(other_grad, grad, atol=1e-6, rtol=1e-4)


def test_long_conversations_end_at_their_last_whole_answer(sft: SFT) -> None:
    turns = ["Thank you", "Oster", "Where is it?", "In the valley, of course. Thank you very much! " * 3]
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    path = sft.config.data[0].with_name("long.jsonl")
    hopeless = {"prompt": "Thank you", "response": turns[3]}
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(hopeless) + "\n", encoding="utf-8")
    dataset = with_config(sft, data=[path]).dataset()
    assert (dataset.counts["cut"], dataset.counts["dropped as too long"]) == (1, 1)
    (row,) = dataset.train
    tokenizer = sft.tokenizer
    assert tokenizer.decode(row.tokens[: row.length].tolist(), skip_special=False) == (
        "<|bos|><|user|>Thank you<|assistant|>Oster<|eos|>"
    )
    assert row.weight == len(tokenizer.encode("Oster")) + 1


def test_no_prompt_is_both_trained_on_and_held_out(sft: SFT) -> None:
    path = sft.config.data[0].with_name("many.jsonl")
    rows = [{"prompt": f"Where is {i % 30}?", "response": f"In {i}"} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = with_config(sft, data=[path], held_out=0.3, packing=False).dataset()

    def prompts(side: object) -> set[str]:
        assert isinstance(side, list)
        texts = (sft.tokenizer.decode(r.tokens[: r.length].tolist(), skip_special=False) for r in side)
        return {text.split("<|assistant|>")[0] for text in texts}

    held_out, train = prompts(dataset.held_out), prompts(dataset.train)
    assert held_out and train and not held_out & train and len(held_out | train) == 30


def pretraining(tmp_path: Path, text: str, **changes: object) -> LanguageModel:
    small_tokenizer().save(tmp_path / "vocab")
    (tmp_path / "corpus.txt").write_text(text, encoding="utf-8")
    values = {"data": [tmp_path / "corpus.txt"], "tokenizer": tmp_path / "vocab", "held_out": 0, "device": "cpu"}
    return LanguageModel(PretrainConfig(**{**values, **changes}))


def test_windows_predict_every_token_but_the_first_once() -> None:
    ids = list(range(100))
    for length in (2, 7, 50, 99, 100, 101):
        pieces = list(windows(ids, length))
        assert [i for piece in pieces for i in piece[1:]] == ids[1:]
        assert all(len(piece) <= length for piece in pieces)


def test_pretraining_counts_every_token_once(tmp_path: Path) -> None:
    documents = ["What is the capital of the valley?" * 20, "Thank you very much!"]
    objective = pretraining(tmp_path, "\n\n".join(documents), max_length=32)
    dataset = objective.dataset()
    expected = sum(len(small_tokenizer().encode(text)) + 1 for text in documents)  # EOS is a target, BOS is not
    assert sum(row.weight for row in dataset.train) == expected
    model = objective.build(torch.device("cpu"))
    loss = accumulate(objective, model, step_input(objective, dataset.train, World(), micro_batch(4)), World())
    assert float(loss) == pytest.approx(torch.tensor(model.config.vocab_size).log().item(), abs=0.1)


def test_pretraining_stops_at_max_tokens(tmp_path: Path) -> None:
    text = "\n\n".join(f"line number {i}" for i in range(50))
    everything = pretraining(tmp_path, text, max_length=32).dataset()
    some = pretraining(tmp_path, text, max_length=32, max_tokens=100).dataset()
    longest = max(len(small_tokenizer().encode(f"line number {i}")) for i in range(50)) + 2
    assert 100 <= some.counts["training tokens"] < 100 + longest < everything.counts["training tokens"]


def test_rows_longer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length = 512 is more than the model's 256 positions"):
        pretraining(tmp_path, "text", max_length=512)


def test_saved_folder_is_the_model_and_its_tokenizer(sft: SFT, tmp_path: Path) -> None:
    model = sft.build(torch.device("cpu"))
    sft.save(model, tmp_path / "saved")
    again = sft.load(tmp_path / "saved", torch.device("cpu"))
    for before, after in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(before, after)
    assert Tokenizer.load(tmp_path / "saved").fingerprint == sft.tokenizer.fingerprint


def test_dropout_acts_in_training_alone(sft: SFT) -> None:
    objective = with_config(sft, dropout=0.5)
    model, rows = objective.build(torch.device("cpu")), list(objective.dataset().train)
    batch = objective.collate(rows)
    model.train()
    assert objective.loss(model, batch).item() != objective.loss(model, batch).item()
    model.eval()
    assert objective.loss(model, batch).item() == objective.loss(model, batch).item()


def test_rows_without_a_target_are_left_out() -> None:
    documents = [Document(tokens=[1, 2], weights=[1.0, 0.0]), Document(tokens=[3, 4], weights=[1.0, 2.0])]
    (row,) = to_rows(documents, max_length=8, packing=False)
    assert row.tokens.tolist() == [3, 4] and row.weights.tolist() == [0.0, 2.0] and row.weight == 2.0


def test_perplexity_of_a_uniform_model_is_the_vocabulary(sft: SFT) -> None:
    model = small_model(sft.tokenizer.vocab_size)
    with torch.no_grad():
        model.wte.weight.zero_()
    facts = sft.facts(model, sft.collate(list(sft.dataset().train)))
    assert sft.metrics(facts)["eval/perplexity"] == pytest.approx(sft.tokenizer.vocab_size, rel=1e-5)
