"""Screening: a look at drafts before any token of them is given out (paper v4, section 7.3)."""

import dataclasses
import enum
from collections.abc import Callable

from looplm_jax.errors import UserError


class Screening(enum.Enum):
    """What becomes of the drafts of a row."""

    CONTINUE = "continue"  # they are verified
    STOP = "stop"  # they are dropped, and the row ends


@dataclasses.dataclass(frozen=True)
class Reroute:
    """Other tokens in the place of the drafts. They are given out as they are, and the row goes on from them."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not self.tokens:
            raise UserError("a reroute needs at least one token; use Screening.STOP to end the row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreenedRow:
    """The row that drafts belong to: its number in the batch, its prompt, and what was given out so far."""

    index: int
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]


Screen = Callable[[ScreenedRow, tuple[int, ...]], Screening | Reroute]
