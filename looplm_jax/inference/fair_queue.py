"""A bounded queue whose clients take turns: one that asks for much does not keep the others waiting."""

import collections
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each client; between clients in turn."""

    def __init__(self, limit: int):
        self._limit = limit
        self._size = 0
        self._waiting: collections.OrderedDict[str, collections.deque[T]] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether `push` must wait."""
        return self._size >= self._limit

    def push(self, client: str, item: T) -> None:
        """Add an item. Raises OverflowError when the queue is full."""
        if self.full:
            raise OverflowError(f"{self._limit} items are waiting")
        self._waiting.setdefault(client, collections.deque()).append(item)
        self._size += 1

    def pop(self) -> T:
        """The oldest item of the client whose turn it is. Raises IndexError when nothing waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        client, items = self._waiting.popitem(last=False)
        item = items.popleft()
        self._size -= 1
        if items:
            self._waiting[client] = items  # behind the others
        return item

    def remove(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Take out all items of a kind, wherever they stand; the others keep their order."""
        waiting, removed = self._waiting, list[T]()
        self._waiting = collections.OrderedDict()
        for client, items in waiting.items():
            kept = collections.deque[T]()
            for item in items:
                (removed if unwanted(item) else kept).append(item)
            if kept:
                self._waiting[client] = kept
        self._size -= len(removed)
        return removed
