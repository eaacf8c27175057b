"""Batches of rows that need no more packing, read at random by threads that all streams of a process share."""

import collections
import concurrent.futures
import functools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

_THREADS = 16  # what they wait for is mostly a bucket
_BATCHES_AHEAD = 2


class RowBatches:
    """An endless stream of batches of `rows`, read ahead in order. Its state is how many batches were handed out.

    Args:
      rows: rows by index, without end, each a dictionary of arrays.
      batch_rows: how many make a batch.
    """

    def __init__(self, rows: grain.MapDataset, batch_rows: int):
        self._rows, self._batch_rows = rows, batch_rows
        self._done = 0
        self._ahead: collections.deque[list[concurrent.futures.Future[Any]]] = collections.deque()

    def __iter__(self) -> "RowBatches":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        while len(self._ahead) <= _BATCHES_AHEAD:
            self._read_ahead()
        rows = [future.result() for future in self._ahead[0]]
        self._ahead.popleft()
        self._done += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """The place after the batch handed out last."""
        return {"batches": self._done}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue there."""
        self.close()
        self._done = state["batches"]

    def close(self) -> None:
        """Read no further ahead."""
        for future in (future for batch in self._ahead for future in batch):
            future.cancel()
        self._ahead.clear()

    def _read_ahead(self) -> None:
        start = (self._done + len(self._ahead)) * self._batch_rows
        places = range(start, start + self._batch_rows)
        self._ahead.append([_threads().submit(self._rows.__getitem__, place) for place in places])


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """One pool, whatever the number of sources and of lanes."""
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="rows")
