"""Conditions that end a text: stop tokens, stop strings, and a number of tokens."""

import dataclasses
import enum
from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.field_checks import whole_number
from looplm_jax.inference.text_stream import TextStream


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
            text += self._give(len(self._held))
            self._finish = finish
        return text

    def _read(self, text: str) -> str:
        """Adds text, and returns the part that no stop string can change."""
        self._held += text
        start = self._first_stop()
        if start is not None:
            self._finish = Finish.STOP
            return self._give(start)
        return self._give(len(self._held) - self._beginning())

    def _first_stop(self) -> int | None:
        """Returns the start of the stop string that is completed first, or None."""
        starts = [(stop, self._held.find(stop)) for stop in self._conditions.stop_strings]
        # The smallest end, then the smallest start, which is the longest stop string.
        _, first = min(((start + len(stop), start) for stop, start in starts if start >= 0), default=(0, None))
        return first

    def _beginning(self) -> int:
        """Returns the length of the longest suffix of the text that is a proper prefix of a stop string."""
        beginnings = (stop[:size] for stop in self._conditions.stop_strings for size in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)

    def _give(self, size: int) -> str:
        """Returns the first characters of the text that is held back."""
        text, self._held = self._held[:size], self._held[size:]
        self._characters += len(text)
        return text
