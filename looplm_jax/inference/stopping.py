"""Where a text ends: stop tokens, stop strings, a number of tokens."""

import dataclasses
import enum
from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.field_checks import whole_number
from looplm_jax.inference.text_stream import TextStream


class Finish(enum.Enum):
    """Why a generation ended."""

    LENGTH = "length"  # all the tokens that were asked for
    STOP = "stop"  # a stop token or a stop string
    CANCELLED = "cancelled"
    FAILED = "failed"  # logits that are not finite, or a callback that raised


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopConditions:
    """What ends a text, whichever comes first."""

    stop_ids: frozenset[int] = frozenset()  # tokens, whose own text is not part of the text
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
    """In the place of a `TextStream` where there is no tokenizer."""

    def push(self, token: int) -> str:
        del token
        return ""

    def close(self) -> str:
        return ""


class StopMatcher:
    """Takes the tokens of one request and gives out its text, up to where it ends and nothing beyond.

    The text ends before the stop string that is complete first, reading character by character; before the longest one
    if several end there. It therefore does not depend on how the text is cut into tokens. Characters that may yet turn
    out to begin a stop string are held back. Without a tokenizer there is no text, and only tokens are counted and
    compared. Raises UserError for stop strings without a tokenizer.
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
        """Why the text has ended, or None while it goes on."""
        return self._finish

    @property
    def characters(self) -> int:
        """Characters given out so far; once the text has ended, where it ends."""
        return self._characters

    def push(self, token: int) -> str:
        """The text that is certain with this token. Tokens after the end are ignored."""
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
        """End the text, and give out what was held back of it. Nothing happens where it has ended before."""
        if self._finish is not None:
            return ""
        text = self._read(self._stream.close())
        if self._finish is None:
            text += self._give(len(self._held))
            self._finish = finish
        return text

    def _read(self, text: str) -> str:
        self._held += text
        start = self._first_stop()
        if start is not None:
            self._finish = Finish.STOP
            return self._give(start)
        return self._give(len(self._held) - self._beginning())

    def _first_stop(self) -> int | None:
        """Where the stop string begins that is complete first."""
        starts = [(stop, self._held.find(stop)) for stop in self._conditions.stop_strings]
        _, first = min(((start + len(stop), start) for stop, start in starts if start >= 0), default=(0, None))
        return first

    def _beginning(self) -> int:
        """Characters of the longest end of the text that begins a stop string."""
        beginnings = (stop[:size] for stop in self._conditions.stop_strings for size in range(1, len(stop)))
        return max((len(beginning) for beginning in beginnings if self._held.endswith(beginning)), default=0)

    def _give(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self._characters += len(text)
        return text
