"""The same global batches for any number of processes and any mesh.

Rows of the global batch come in lanes: streams of their own, with documents of their own. How many lanes there are is
fixed by the shape of the batch alone, so a batch holds the same rows however it is cut into parts. A process opens the
lanes that hold rows of its devices, so reading, tokenising and packing are shared out where batches are large; small
ones are a single lane, which every process reads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from looplm_jax.data.iterator import BatchIterator
from looplm_jax.data.packing import Batch

_LANE_TOKENS = 2**17  # of a step; more lanes would share out little work and hold many rows open


def lane_count(batch_size: int, sequence_length: int, saved: Mapping[str, Any] | None = None) -> int:
    """Returns the lanes of a stream: a power of two that divides the rows of a batch.

    A stream that continues where another stopped has as many as that, given its state.
    """
    if saved is not None:
        return next(iter(_lane_states(saved).values()))["identity"]["process_count"]
    most = max(1, batch_size * sequence_length // _LANE_TOKENS)
    return math.gcd(batch_size, 2 ** (most.bit_length() - 1))


class LaneBatches:
    """One process's rows of an endless stream of global batches.

    Args:
      open_lane: opens the stream of a lane, whose batches hold `batch_size / lanes` rows.
      lanes: how many there are.
      rows: which rows of a part this process holds, ascending.
      part_rows: rows of a part of the global batch.
      parts: parts that a batch is accumulated from. Where lanes divide the rows of a part, each part has rows of every
        lane, in the order of the lanes; else each row of the parts has lanes of its own.
    """

    def __init__(
        self,
        open_lane: Callable[[int], BatchIterator],
        *,
        lanes: int,
        rows: Sequence[int],
        part_rows: int,
        parts: int = 1,
    ):
        places = [_place(part, row, lanes, part_rows, parts) for part in range(parts) for row in rows]
        needed = sorted({lane for lane, _ in places})
        self._chosen = np.array([needed.index(lane) for lane, _ in places]), np.array([row for _, row in places])
        self._lanes = {lane: open_lane(lane) for lane in needed}

    def __iter__(self) -> "LaneBatches":
        return self

    def __next__(self) -> Batch:
        """The rows of the next batch, part after part."""
        batches = [next(lane) for lane in self._lanes.values()]
        names = [field.name for field in dataclasses.fields(Batch)]
        return Batch(**{name: self._own([getattr(batch, name) for batch in batches]) for name in names})

    def state(self) -> dict[str, Any]:
        """Where the lanes of this process are; those of all processes together are the state of the whole stream."""
        return {"lanes": {str(number): lane.state() for number, lane in self._lanes.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch that the state of the whole stream was taken at.

        Raises:
          UserError: the state belongs to another stream.
        """
        states = _lane_states(state)
        for number, lane in self._lanes.items():
            lane.restore(states.get(str(number), next(iter(states.values()))))

    def close(self) -> None:
        """Stop the prefetching threads."""
        for lane in self._lanes.values():
            lane.close()

    def _own(self, lanes: Sequence[Shaped[np.ndarray, "rows S"]]) -> Shaped[np.ndarray, "own S"]:
        return np.stack(lanes)[self._chosen]


def _place(part: int, row: int, lanes: int, part_rows: int, parts: int) -> tuple[int, int]:
    """Returns the lane that a row of a part comes from, and which of the rows that the lane gives it is."""
    width, rest = divmod(part_rows, lanes)
    if not rest:
        return row // width, part * width + row % width
    return divmod(row * parts + part, part_rows * parts // lanes)


def _lane_states(state: Mapping[str, Any]) -> Mapping[str, Any]:
    return state.get("lanes", {"0": state})  # a version before lanes saved the state of its only stream
