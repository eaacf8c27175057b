"""A bounded queue whose clients take turns, so that a client with many items does not delay the others."""

import collections
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """A queue that is first in, first out per client, and alternates between clients.

    Every operation takes constant time, regardless of the number of items.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._size = 0
        # A dictionary keeps its order and deletes any key in constant time; the values are unused.
        self._waiting: collections.OrderedDict[str, collections.OrderedDict[T, None]] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether `push` would raise."""
        return self._size >= self._limit

    def push(self, client: str, item: T) -> None:
        """Adds an item that is not in the queue. Raises OverflowError if the queue is full."""
        if self.full:
            raise OverflowError(f"{self._limit} items are waiting")
        self._waiting.setdefault(client, collections.OrderedDict())[item] = None
        self._size += 1

    def first(self) -> T:
        """Returns the item that `pop` would return, without removing it. Raises IndexError if the queue is empty."""
        if not self._waiting:
            raise IndexError("nothing waits")
        return next(iter(next(iter(self._waiting.values()))))

    def pop(self) -> T:
        """Removes and returns the oldest item of the next client. Raises IndexError if the queue is empty."""
        if not self._waiting:
            raise IndexError("nothing waits")

        client, items = self._waiting.popitem(last=False)
        item, _ = items.popitem(last=False)
        self._size -= 1
        if items:
            self._waiting[client] = items  # after the other clients

        return item

    def discard(self, client: str, item: T) -> bool:
        """Removes an item of a client; the others keep their order. Returns whether the item was in the queue."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False

        del items[item]
        self._size -= 1
        # A client without items must not get a turn.
        if not items:
            del self._waiting[client]
        return True
