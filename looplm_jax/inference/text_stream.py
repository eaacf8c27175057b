"""Incremental decoding: a character is returned once all of its bytes have arrived."""

import itertools
import operator
from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes a growing list of tokens piece by piece. The pieces together are the text of the continuation.

    The text of a token depends on the token before it (spaces, bytes of one character), so each piece is decoded after
    the previous one, and the first after the prompt. A part of the prompt would not suffice: if it splits a character,
    `tokenizers` decodes no byte of the following run.

    A character that starts in the prompt and is completed by new tokens belongs entirely to the new text: the prompt's
    text up to its last complete character, and the pieces, together are the text of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._before = list(prompt_ids)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Returns the text that this token completes; empty while a character lacks bytes."""
        self._waiting.append(token)
        known, text = self._decoded()
        if text.endswith(_INCOMPLETE):
            return ""
        # Only the last complete piece is needed as context for the next one.
        self._before, self._waiting = self._waiting, []
        return _behind(known, text)

    def close(self) -> str:
        """Returns the rest: bytes that never became a character."""
        return _behind(*self._decoded()) if self._waiting else ""

    def _decoded(self) -> tuple[str, str]:
        """Returns the text without the pending tokens, and with them."""
        return self._tokenizer.decode(self._before), self._tokenizer.decode(self._before + self._waiting)


def _behind(known: str, text: str) -> str:
    """Returns what `text` adds to `known`, replacing trailing characters of `known` that were incomplete."""
    if known.endswith(_INCOMPLETE) and not text.startswith(known):
        same = itertools.takewhile(bool, map(operator.eq, known, text))
        return text[sum(same) :]
    return text[len(known) :]
