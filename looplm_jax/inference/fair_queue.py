"""A bounded queue whose clients take turns: one that asks for much does not keep the others waiting."""

import collections
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """First in, first out for each client; between clients in turn.

    Every operation takes the same time, however many items wait.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._size = 0
        # A dictionary keeps its order and forgets any key in constant time; its values mean nothing.
        self._waiting: collections.OrderedDict[str, collections.OrderedDict[T, None]] = collections.OrderedDict()

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether `push` must wait."""
        return self._size >= self._limit

    def push(self, client: str, item: T) -> None:
        """Add an item that is not waiting already. Raises OverflowError when the queue is full."""
        if self.full:
            raise OverflowError(f"{self._limit} items are waiting")
        self._waiting.setdefault(client, collections.OrderedDict())[item] = None
        self._size += 1

    def first(self) -> T:
        """What `pop` would return, which stays. Raises IndexError when nothing waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        return next(iter(next(iter(self._waiting.values()))))

    def pop(self) -> T:
        """The oldest item of the client whose turn it is. Raises IndexError when nothing waits."""
        if not self._waiting:
            raise IndexError("nothing waits")
        client, items = self._waiting.popitem(last=False)
        item, _ = items.popitem(last=False)
        self._size -= 1
        if items:
            self._waiting[client] = items  # behind the others
        return item

    def discard(self, client: str, item: T) -> bool:
        """Take out an item of a client; the others keep their order. Returns whether it was waiting."""
        items = self._waiting.get(client)
        if items is None or item not in items:
            return False
        del items[item]
        self._size -= 1
        if not items:
            del self._waiting[client]
        return True
