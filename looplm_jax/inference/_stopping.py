"""Conditions that end a text (stop tokens, stop strings, a number of tokens), and text from tokens, piece by piece."""

import dataclasses
import enum
import itertools
import operator
from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference._field_checks import whole_number

# Text from tokens


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
        # Tokens whose text is not complete yet, such as the first bytes of a character.
        self._waiting.append(token)
        known, text = self._decoded()
        if text.endswith(_INCOMPLETE):
            return ""
        # Only the last complete piece is needed as context for the next one.
        self._before, self._waiting = self._waiting, []
        return _added_text(known, text)

    def close(self) -> str:
        """Returns the rest: bytes that never became a character."""
        return _added_text(*self._decoded()) if self._waiting else ""

    def _decoded(self) -> tuple[str, str]:
        """Returns the text without the pending tokens, and with them."""
        return self._tokenizer.decode(self._before), self._tokenizer.decode(self._before + self._waiting)


def _added_text(known: str, text: str) -> str:
    """Returns what `text` adds to `known`, replacing trailing characters of `known` that were incomplete."""
    if known.endswith(_INCOMPLETE) and not text.startswith(known):
        same = itertools.takewhile(bool, map(operator.eq, known, text))
        # Incomplete characters at the end of `known` may decode differently now.
        return text[sum(same) :]
    return text[len(known) :]


# Conditions that end a text


class Finish(enum.Enum):
    """The reason why a generation ended."""

    LENGTH = "length"  # the requested number of tokens is reached
    STOP = "stop"  # a stop token or a stop string
    CANCELLED = "cancelled"
    FAILED = "failed"  # logits that are not finite, or a callback that raised


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopConditions:
    """The conditions that end a text; the first one that is met counts."""

    stop_ids: frozenset[int] = frozenset()  # tokens; their text is not part of the text
    stop_strings: tuple[str, ...] = ()  # not part of the text either
    max_new_tokens: int

    def __post_init__(self) -> None:
        # A string is a sequence of strings, so it would be taken for its characters.
        if isinstance(self.stop_strings, str):
            raise UserError(f"stop_strings must be a list of strings; write [{self.stop_strings!r}]")
        if not isinstance(self.stop_strings, Sequence) or not all(isinstance(own, str) for own in self.stop_strings):
            raise UserError(f"stop_strings must be a list of strings, not {self.stop_strings!r}")

        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))

        if "" in self.stop_strings:
            raise UserError("a stop string is empty, so every text would end at once; leave it out")
        if any(token < 0 for token in self.stop_ids):
            raise UserError(f"stop id {min(self.stop_ids)} is negative; ids of tokens count from 0")
        object.__setattr__(self, "max_new_tokens", whole_number("max_new_tokens", self.max_new_tokens, least=1))


class _NoText:
    """A `TextStream` without a tokenizer, whose text is empty."""

    def push(self, token: int) -> str:
        del token
        return ""

    def close(self) -> str:
        return ""


class StopMatcher:
    """Consumes the tokens of one request and returns its text, up to where it ends.

    The text ends before the stop string that is completed first, reading character by character; if several are
    completed together, before the longest one. The text therefore does not depend on how it is split into tokens.
    Characters that may still be the start of a stop string are held back. Without a tokenizer the text is empty, and
    tokens are only counted and compared. Raises UserError for stop strings without a tokenizer.
    """

    def __init__(self, conditions: StopConditions, tokenizer: Tokenizer | None, prompt_ids: Sequence[int] = ()):
        if conditions.stop_strings and tokenizer is None:
            raise UserError("stop strings need a tokenizer to find them by; give one, or use stop_ids")
        self._conditions = conditions
        self._stream: TextStream | _NoText = _NoText() if tokenizer is None else TextStream(tokenizer, prompt_ids)
        self._held = ""
        self._tokens = 0
        self._characters = 0
        self._finish: Finish | None = None

    @property
    def finish(self) -> Finish | None:
        """Returns why the text has ended, or None if it has not."""
        return self._finish

    @property
    def characters(self) -> int:
        """Returns the number of characters returned so far; after the end, the length of the text."""
        return self._characters

    def push(self, token: int) -> str:
        """Returns the text that is final with this token. Tokens after the end are ignored."""
        if self._finish is not None:
            return ""
        self._tokens += 1
        if token in self._conditions.stop_ids:
            return self.close(Finish.STOP)

        text = self._read(self._stream.push(token))
        if self._tokens == self._conditions.max_new_tokens:
            text += self.close(Finish.LENGTH)
        return text

    def close(self, finish: Finish) -> str:
        """Ends the text, and returns the text that was held back. Does nothing if the text has ended."""
        if self._finish is not None:
            return ""
        # Bytes of an unfinished character may still complete a stop string.
        text = self._read(self._stream.close())
        if self._finish is None:
            text += self._release(len(self._held))
            self._finish = finish
        return text

    def _read(self, text: str) -> str:
        """Adds text, and returns the part that no stop string can change."""
        self._held += text
        start = self._first_stop()
        if start is not None:
            self._finish = Finish.STOP
            return self._release(start)
        return self._release(len(self._held) - self._partial_stop())

    def _first_stop(self) -> int | None:
        """Returns the start of the stop string that is completed first, or None."""
        starts = [(stop, self._held.find(stop)) for stop in self._conditions.stop_strings]
        # The smallest end, then the smallest start, which is the longest stop string.
        _, first = min(((start + len(stop), start) for stop, start in starts if start >= 0), default=(0, None))
        return first

    def _partial_stop(self) -> int:
        """Returns the length of the longest suffix of the text that is a proper prefix of a stop string."""
        # Only the end of the text matters: an earlier start of a stop string has been followed by something else.
        beginnings = (stop[:size] for stop in self._conditions.stop_strings for size in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)

    def _release(self, size: int) -> str:
        """Returns the first characters of the text that is held back."""
        text, self._held = self._held[:size], self._held[size:]
        self._characters += len(text)
        return text
