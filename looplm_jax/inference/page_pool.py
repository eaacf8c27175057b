"""Pages of the cache: how large the pool is, and which of them belong to whom.

A request reserves pages for all tokens that it may have before its prompt is read, so that no request is ever stopped
half way for want of memory.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSize:
    """Pages that all slots share, and how many of them the longest request takes."""

    pages: int
    page_size: int  # positions of a page
    pages_per_slot: int

    @classmethod
    def of(cls, *, slots: int, capacity: int, page_size: int, pages: int | None = None) -> "PoolSize":
        """Returns the pool of an engine. By default every slot can have a request of `capacity` tokens."""
        page_size = min(page_size, capacity)
        pages_per_slot = -(-capacity // page_size)
        pages = slots * pages_per_slot if pages is None else pages
        return cls(pages=pages, page_size=page_size, pages_per_slot=pages_per_slot)

    @property
    def positions(self) -> int:
        """Positions of all pages."""
        return self.pages * self.page_size

    def needed(self, tokens: int) -> int:
        """Returns the pages that so many tokens take."""
        return -(-tokens // self.page_size)


class PagePool:
    """The free pages of a cache. A page that was given back is used again after those that were free before it."""

    def __init__(self, pages: int):
        self._free = collections.deque(range(pages))
        self._reserved: set[int] = set()

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def reserve(self, count: int) -> tuple[int, ...]:
        """Returns pages that nobody else has until they are released. Raises OverflowError if too few are free."""
        if count > self.free:
            raise OverflowError(f"{count} pages are wanted and {self.free} are free")
        pages = tuple(self._free.popleft() for _ in range(count))
        self._reserved.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Takes pages back. Raises ValueError, and takes none, unless all of them are reserved."""
        if len(set(pages)) != len(pages) or not self._reserved.issuperset(pages):
            raise ValueError(f"of the pages {list(pages)} some are not reserved")
        self._reserved.difference_update(pages)
        self._free.extend(pages)
