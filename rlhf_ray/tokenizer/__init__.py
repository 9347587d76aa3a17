"""Byte-level BPE (encode, decode, train) and the templates that turn conversations into tokens."""

from rlhf_ray.tokenizer.bpe import Tokenizer
from rlhf_ray.tokenizer.hf_files import write_hf_tokenizer
from rlhf_ray.tokenizer.stream import StreamDecoder
from rlhf_ray.tokenizer.templates import TEMPLATES, Template, find_template
from rlhf_ray.tokenizer.trainer import train_bpe
from rlhf_ray.tokenizer.vocabulary import SPECIAL_TOKENS

__all__ = [
    "SPECIAL_TOKENS",
    "TEMPLATES",
    "StreamDecoder",
    "Template",
    "Tokenizer",
    "find_template",
    "train_bpe",
    "write_hf_tokenizer",
]
