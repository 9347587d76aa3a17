"""Text from ids that arrive one at a time, never with half a UTF-8 character.

The concatenation of everything emitted equals ``Tokenizer.decode`` of all the ids, invalid bytes included.
"""

from __future__ import annotations

import codecs

from rlhf_ray.tokenizer.bpe import Tokenizer


class StreamDecoder:
    """Decodes one sequence of ids; special ids are dropped unless ``skip_special`` is False."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that the id completes; empty while a character is incomplete; ValueError for an unknown id."""
        return self._utf8.decode(self._tokenizer.token_bytes((token_id,), skip_special=self._skip_special))

    def flush(self) -> str:
        """End the sequence: an incomplete character becomes U+FFFD, and the decoder can be used again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
