"""The choice of what a key-value cache keeps of the loops of a token. This module does not import JAX."""

import dataclasses
import re
from typing import ClassVar

from looplm_jax.errors import UserError, suggest

_NAMES = ("full", "last", "average", "first", "ring(2)")
_RING = re.compile(r"ring\(([1-9]\d{0,5})\)")


@dataclasses.dataclass(frozen=True)
class CacheStrategy:
    """The loops of a token that the cache keeps, by name; `CacheStrategy("last") == CacheStrategy.LAST`.

    `CacheStrategy("ring(4)")` has four planes, and loop t uses plane (t - 1) mod 4, so it keeps the last four loops
    (Huginn, arXiv 2502.05171). `LAST` is a ring of one plane.

    Raises:
      UserError: there is no strategy of this name.
    """

    FULL: ClassVar["CacheStrategy"]
    LAST: ClassVar["CacheStrategy"]
    AVERAGE: ClassVar["CacheStrategy"]
    FIRST: ClassVar["CacheStrategy"]

    value: str

    def __post_init__(self) -> None:
        if self.value not in _NAMES and not _RING.fullmatch(str(self.value)):
            raise UserError(f"unknown cache {self.value!r}{suggest(str(self.value), _NAMES)}")

    def __str__(self) -> str:
        return self.value

    @property
    def shares(self) -> bool:
        """Whether several loops use one plane of the cache."""
        return self != CacheStrategy.FULL

    @property
    def ring(self) -> int | None:
        """The planes of a ring; None for a cache that is none."""
        if self == CacheStrategy.LAST:
            return 1
        match = _RING.fullmatch(self.value)
        return None if match is None else int(match[1])

    def planes(self, loops: int) -> int:
        """Returns the planes of a cache for tokens of up to `loops` loops.

        Raises:
          UserError: a ring has more planes than there are loops.
        """
        if self == CacheStrategy.FULL:
            return loops
        planes = self.ring or 1
        if planes > loops:
            raise UserError(f"cache {self} has more planes than the {loops} loops; use the cache full")
        return planes


CacheStrategy.FULL = CacheStrategy("full")
CacheStrategy.LAST = CacheStrategy("last")
CacheStrategy.AVERAGE = CacheStrategy("average")
CacheStrategy.FIRST = CacheStrategy("first")
