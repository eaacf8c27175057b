"""Screening: inspection of drafts before any of their tokens is emitted (paper v4, section 7.3)."""

import dataclasses
import enum
from collections.abc import Callable

from looplm_jax.errors import UserError


class Screening(enum.Enum):
    """The decision about the drafts of a row."""

    CONTINUE = "continue"  # verify them
    STOP = "stop"  # drop them, and end the row


@dataclasses.dataclass(frozen=True)
class Reroute:
    """Tokens to use instead of the drafts. They are emitted unchanged, and the row continues from them."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not self.tokens:
            raise UserError("a reroute needs at least one token; use Screening.STOP to end the row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreenedRow:
    """The row of the drafts: its index in the batch, its prompt, and the tokens emitted so far."""

    index: int
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]


Screen = Callable[[ScreenedRow, tuple[int, ...]], Screening | Reroute]
