"""Text as its tokens come in: a character is given out when all of its bytes are there."""

from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer

_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes a growing list of tokens piece by piece. All pieces together are the text of the continuation.

    A token's text depends on the one before it (spaces, bytes of one character): each is decoded behind the last piece,
    the first behind the prompt. A part of the prompt would not do: where it cuts a character in two, `tokenizers` reads
    no byte of the run that follows.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._before = list(prompt_ids)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character lacks bytes."""
        self._waiting.append(token)
        text = self._text()
        if text.endswith(_INCOMPLETE):
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def close(self) -> str:
        """What is left: bytes that never became a character."""
        return self._text() if self._waiting else ""

    def _text(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._waiting)[len(known) :]
