"""The pool of cache pages: its size, and which pages are reserved.

A request reserves pages for its prompt and all its new tokens before its prompt is read, so that no running request
runs out of memory.
"""

import collections
import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSize:
    """The pages that all slots share, and the most pages of one request."""

    pages: int
    page_size: int  # positions of a page
    pages_per_slot: int

    @classmethod
    def of(cls, *, slots: int, capacity: int, page_size: int, pages: int | None = None) -> "PoolSize":
        """Returns the pool of an engine. The default has pages for a request of `capacity` tokens in every slot."""
        page_size = min(page_size, capacity)
        pages_per_slot = -(-capacity // page_size)
        pages = slots * pages_per_slot if pages is None else pages
        return cls(pages=pages, page_size=page_size, pages_per_slot=pages_per_slot)

    @property
    def positions(self) -> int:
        """The positions of all pages."""
        return self.pages * self.page_size

    def needed(self, tokens: int) -> int:
        """Returns the number of pages for `tokens` tokens."""
        return -(-tokens // self.page_size)


class PagePool:
    """The free and the reserved pages of a cache. Pages are reserved in the order in which they became free."""

    def __init__(self, pages: int):
        self._free = collections.deque(range(pages))
        self._reserved: set[int] = set()

    @property
    def free(self) -> int:
        """The number of free pages."""
        return len(self._free)

    def reserve(self, count: int) -> tuple[int, ...]:
        """Reserves and returns `count` pages. Raises OverflowError if fewer are free."""
        if count > self.free:
            raise OverflowError(f"{count} pages are wanted and {self.free} are free")
        pages = tuple(self._free.popleft() for _ in range(count))
        self._reserved.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Frees reserved pages. Raises ValueError, and frees none, unless all of them are reserved."""
        if len(set(pages)) != len(pages) or not self._reserved.issuperset(pages):
            raise ValueError(f"of the pages {list(pages)} some are not reserved")
        self._reserved.difference_update(pages)
        self._free.extend(pages)
