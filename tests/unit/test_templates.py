"""Templates: exact ids, the mask of what the assistant says, and the same ids from transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.tokenizer import TEMPLATES, Tokenizer, find_template, train_bpe, write_hf_tokenizer
from rlhf_ray.types import Message

SAMPLE = "Add one and two. The answer is three, and the other answer is four.\n\n### Instruction:\n### Response:\n" * 3


def say(*turns: str) -> list[Message]:
    """Messages from 'role: content' lines."""
    return [Message(role=turn.split(": ")[0], content=turn.split(": ", 1)[1]) for turn in turns]


DIALOGUE = say("system: Be brief.", "user: Add one", "assistant: two.", "user: and two?", "assistant: four <|eos|>")


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    """A small vocabulary."""
    return train_bpe([SAMPLE], 290)


def test_chat_is_spelt_out(tok: Tokenizer) -> None:
    ids, mask = TEMPLATES["chat"].conversation_ids(tok, DIALOGUE)
    parts = [
        ([tok.bos_id], False),
        ([tok.system_id, *tok.encode("Be brief.")], False),
        ([tok.user_id, *tok.encode("Add one"), tok.assistant_id], False),
        ([*tok.encode("two."), tok.eos_id], True),
        ([tok.user_id, *tok.encode("and two?"), tok.assistant_id], False),
        ([*tok.encode("four <|eos|>"), tok.eos_id], True),
    ]
    assert ids == [i for part, _ in parts for i in part]
    assert mask == [spoken for part, spoken in parts for _ in part]
    assert ids.count(tok.eos_id) == 2  # the one spelt in the text is text
    assert TEMPLATES["chat"].prompt_ids(tok, DIALOGUE[:2])[-1] == tok.assistant_id


def test_alpaca_and_plain_are_spelt_out(tok: Tokenizer) -> None:
    decode = {
        name: tok.decode(TEMPLATES[name].conversation_ids(tok, DIALOGUE)[0], skip_special=False) for name in TEMPLATES
    }
    assert decode["alpaca"] == (
        "<|bos|>Be brief.\n\n### Instruction:\nAdd one\n\n### Response:\ntwo.<|eos|>"
        "### Instruction:\nand two?\n\n### Response:\nfour <|eos|><|eos|>"
    )
    assert decode["plain"] == "<|bos|>Be brief.Add onetwo.<|eos|>and two?four <|eos|><|eos|>"
    assert TEMPLATES["plain"].prompt_ids(tok, say("user: Add one")) == [tok.bos_id, *tok.encode("Add one")]
    alpaca = tok.decode(TEMPLATES["alpaca"].prompt_ids(tok, say("user: Add one")))
    assert alpaca == "### Instruction:\nAdd one\n\n### Response:\n"


messages = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["system", "user", "assistant"]),
        content=st.text("ad \n#:é.", max_size=12),
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), messages, st.text("ad \n<|eos|>", max_size=12))
def test_prompt_and_response_make_the_conversation(
    tok: Tokenizer, name: str, before: list[Message], answer: str
) -> None:
    template = TEMPLATES[name]
    assert template.name == name
    prompt, response = template.prompt_ids(tok, before), template.response_ids(tok, answer)
    ids, mask = template.conversation_ids(tok, [*before, Message(role="assistant", content=answer)])
    assert prompt + response == ids
    assert mask[len(prompt) :] == [True] * len(response)
    answers = [m.content for m in before if m.role == "assistant"]
    spoken = [i for i, said in zip(ids, mask, strict=True) if said]
    assert tok.decode(spoken, skip_special=False) == "".join(f"{text}<|eos|>" for text in [*answers, answer])


def test_unknown_template_is_refused_before_anything_is_written(tok: Tokenizer, tmp_path: Path) -> None:
    assert find_template("chat") is TEMPLATES["chat"]
    with pytest.raises(ValueError, match="template is 'llama'; choose one of chat, alpaca, plain"):
        write_hf_tokenizer(tmp_path / "out", tok, "llama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("with_config", [False, True])
def test_transformers_gives_the_same_ids(tok: Tokenizer, tmp_path: Path, name: str, with_config: bool) -> None:
    from transformers import AutoTokenizer

    write_hf_tokenizer(tmp_path, tok, name)
    if with_config:  # as beside the weights of a policy
        (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert len(hf) == tok.vocab_size
    for text in ("The answer is  three,\n\n it's 4! é 你 😀", " leading", "", "trailing \n"):
        assert hf(text)["input_ids"] == tok.encode(text)
        assert hf.decode(tok.encode(text)) == text
    special = [hf.pad_token_id, hf.bos_token_id, hf.eos_token_id, hf.unk_token_id]
    assert special == [tok.pad_id, tok.bos_id, tok.eos_id, tok.unk_id]
    assert hf.decode([tok.bos_id, tok.user_id, *tok.encode("two"), tok.eos_id], skip_special_tokens=True) == "two"

    dialogue = say("system: Be brief.", "user: Add one", "assistant: two.", "user: And two?")
    dicts = [{"role": m.role, "content": m.content} for m in dialogue]
    theirs = hf.apply_chat_template(dicts, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert theirs == TEMPLATES[name].prompt_ids(tok, dialogue)
    ids, mask = TEMPLATES[name].conversation_ids(tok, dialogue)
    whole = hf.apply_chat_template(dicts, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"] == ids
    assert whole["assistant_masks"] == [int(said) for said in mask]
    assert Tokenizer.load(tmp_path).fingerprint == tok.fingerprint


def test_vocab_json_of_a_hugging_face_folder_is_the_base_alone(tok: Tokenizer, tmp_path: Path) -> None:
    write_hf_tokenizer(tmp_path, tok, "chat")
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == tok.base_size
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    assert [(x["id"], x["content"]) for x in added] == [(i, name) for name, i in tok.special_tokens.items()]
