"""Batches of sequences that are already packed, read at random by a thread pool that all streams of a process share."""

import collections
import concurrent.futures
import functools
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

_THREADS = 16  # reads mostly wait for cloud storage, so there may be more threads than cores
_BATCHES_AHEAD = 2  # batches to prefetch, in addition to the requested one


class RowBatches:
    """An endless stream of batches of prepared sequences, prefetched in order.

    Its state is the number of batches that were returned.

    Args:
      rows: an endless dataset of sequences, each a dictionary of arrays.
      batch_rows: sequences in a batch.
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

        # Results are taken before the batch is removed, so a failed read leaves the position unchanged.
        rows = [future.result() for future in self._ahead[0]]
        self._ahead.popleft()
        self._done += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the position after the last returned batch."""
        return {"batches": self._done}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved position and discards prefetched batches."""
        self.close()
        self._done = state["batches"]

    def close(self) -> None:
        """Cancels prefetching."""
        for future in (future for batch in self._ahead for future in batch):
            future.cancel()
        self._ahead.clear()

    def _read_ahead(self) -> None:
        """Schedules the reads of the next batch that is not yet prefetched."""
        # Sequences are addressed by index, so the position in the stream determines what to read.
        start = (self._done + len(self._ahead)) * self._batch_rows
        places = range(start, start + self._batch_rows)
        self._ahead.append([_threads().submit(self._rows.__getitem__, place) for place in places])


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the thread pool of the process, one for all sources and substreams."""
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="rows")
