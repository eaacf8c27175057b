"""Text as its tokens come in: a character is given out when all of its bytes are there."""

import itertools
import operator
from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes a growing list of tokens piece by piece. All pieces together are the text of the continuation.

    A token's text depends on the one before it (spaces, bytes of one character): each is decoded behind the last piece,
    the first behind the prompt. A part of the prompt would not do: where it cuts a character in two, `tokenizers` reads
    no byte of the run that follows.

    A character that the prompt begins and the new tokens complete belongs, whole, to the new text: what the prompt
    says up to its last whole character and the pieces are together the text of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._before = list(prompt_ids)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        self._waiting.append(token)
        known, text = self._decoded()
        if text.endswith(_INCOMPLETE):
            return ""
        self._before, self._waiting = self._waiting, []
        return _behind(known, text)

    def close(self) -> str:
        """What is left: bytes that never became a character."""
        return _behind(*self._decoded()) if self._waiting else ""

    def _decoded(self) -> tuple[str, str]:
        """The text without the tokens that wait, and with them."""
        return self._tokenizer.decode(self._before), self._tokenizer.decode(self._before + self._waiting)


def _behind(known: str, text: str) -> str:
    """What `text` adds to `known`, whose last characters it replaces where these were bytes of an unfinished one."""
    if known.endswith(_INCOMPLETE) and not text.startswith(known):
        same = itertools.takewhile(bool, map(operator.eq, known, text))
        return text[sum(same) :]
    return text[len(known) :]
