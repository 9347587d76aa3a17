"""The tokenizer's files of a Hugging Face folder, so that transformers, vLLM and lm-eval open it as it is.

``vocab.json`` and ``merges.txt`` hold the base vocabulary, which ``Tokenizer.load`` reads; ``tokenizer.json``
and ``tokenizer_config.json`` add the special tokens and the chat template for the others.

Two differences can't be avoided: those libraries turn special tokens that are spelt in a text into special
ids, and they encode a rendered conversation as one text, so templates without special tokens between turns
(alpaca, plain) may merge across a boundary where content starts or ends with white space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_ray.tokenizer.bpe import Tokenizer
from rlhf_ray.tokenizer.templates import find_template
from rlhf_ray.tokenizer.vocabulary import to_chars, write_text

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _added_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": name, **flags} for name, i in tokenizer.special_tokens.items()]


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json, the format of the ``tokenizers`` library."""
    names = [to_chars(token) for token in tokenizer.vocabulary.tokens]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)},
        "merges": [f"{names[left]} {names[right]}" for left, right in tokenizer.vocabulary.merges],
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer),
        "normalizer": None,
        "pre_tokenizer": _BYTE_LEVEL,
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def _tokenizer_config(tokenizer: Tokenizer, jinja: str) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "unk_token": "<|unk|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
        "added_tokens_decoder": {str(x.pop("id")): x for x in _added_tokens(tokenizer)},
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
        "chat_template": jinja,
    }


def write_hf_tokenizer(folder: Path | str, tokenizer: Tokenizer, template: str) -> None:
    """Write vocab.json, merges.txt, tokenizer.json and tokenizer_config.json with the template of that name.

    Raises ValueError for an unknown template, before anything is written.
    """
    jinja = find_template(template).jinja
    tokenizer.save(folder)
    contents = {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": _tokenizer_config(tokenizer, jinja),
    }
    for name, content in contents.items():
        write_text(Path(folder) / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
