"""Substreams ("lanes"): the same global batches for any number of processes and any mesh.

The sequences of a global batch come from one or several substreams with disjoint documents. The number of substreams
depends only on the shape of the batch, so a batch holds the same sequences regardless of how it is split into
microbatches and over processes. Each process opens only the substreams that feed its devices, so large batches divide
the work of reading, tokenizing and packing; small batches have a single substream, which every process reads.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from looplm_jax.data.iterator import BatchIterator
from looplm_jax.data.packing import Batch

_LANE_TOKENS = 2**17  # tokens of a step per substream; smaller ones would save little work and keep more open sequences


def lane_count(batch_size: int, sequence_length: int, saved: Mapping[str, Any] | None = None) -> int:
    """Returns the number of substreams: a power of two that divides the number of sequences of a batch.

    Args:
      batch_size: sequences in a global batch.
      sequence_length: tokens in a sequence.
      saved: the saved state of a stream to resume, which determines the number if given.
    """
    # A substream is opened as if it were a process, so its process count is the number of substreams.
    if saved is not None:
        return next(iter(_lane_states(saved).values()))["identity"]["process_count"]

    # The largest power of two that divides the batch and leaves each substream at least _LANE_TOKENS per step.
    most = max(1, batch_size * sequence_length // _LANE_TOKENS)
    return math.gcd(batch_size, 2 ** (most.bit_length() - 1))


class LaneBatches:
    """The sequences of one process in an endless stream of global batches.

    If `lanes` divides `part_rows`, every microbatch has sequences from every substream, in their order. Otherwise each
    sequence position of the microbatches has its own substreams.

    Args:
      open_lane: opens a substream by number; its batches hold `batch_size / lanes` sequences.
      lanes: the number of substreams.
      rows: indices, within a microbatch, of the sequences of this process, in ascending order.
      part_rows: the number of sequences in a microbatch of the global batch.
      parts: the number of microbatches that a batch is accumulated from.
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
        # (substream, index in it) of each sequence of this process, microbatch by microbatch.
        places = [_place(part, row, lanes, part_rows, parts) for part in range(parts) for row in rows]
        needed = sorted({lane for lane, _ in places})

        self._chosen = np.array([needed.index(lane) for lane, _ in places]), np.array([row for _, row in places])
        self._lanes = {lane: open_lane(lane) for lane in needed}

    def __iter__(self) -> "LaneBatches":
        return self

    def __next__(self) -> Batch:
        """Returns this process's sequences of the next batch, microbatch after microbatch."""
        # Every substream advances, and then each sequence is picked from its substream.
        batches = [next(lane) for lane in self._lanes.values()]
        names = [field.name for field in dataclasses.fields(Batch)]
        return Batch(**{name: self._own([getattr(batch, name) for batch in batches]) for name in names})

    def state(self) -> dict[str, Any]:
        """Returns the positions of this process's substreams.

        The state of the whole stream is the union of these over all processes.
        """
        return {"lanes": {str(number): lane.state() for number, lane in self._lanes.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to the position after the batch at which the state of the whole stream was taken.

        Raises:
          UserError: the state is from a different stream.
        """
        states = _lane_states(state)
        # A substream without a saved state gets another one's; the identity check then reports the difference.
        for number, lane in self._lanes.items():
            lane.restore(states.get(str(number), next(iter(states.values()))))

    def close(self) -> None:
        """Stops the prefetching threads of all substreams."""
        for lane in self._lanes.values():
            lane.close()

    def _own(self, lanes: Sequence[Shaped[np.ndarray, "rows S"]]) -> Shaped[np.ndarray, "own S"]:
        """Selects this process's sequences from one feature of all opened substreams."""
        return np.stack(lanes)[self._chosen]


def _place(part: int, row: int, lanes: int, part_rows: int, parts: int) -> tuple[int, int]:
    """Returns the substream of a sequence of a microbatch, and its index among the sequences of that substream."""
    # `width` sequences of each microbatch come from each substream.
    width, rest = divmod(part_rows, lanes)
    if not rest:
        return row // width, part * width + row % width
    return divmod(row * parts + part, part_rows * parts // lanes)


def _lane_states(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the state of each substream by its number, as a string."""
    return state.get("lanes", {"0": state})  # versions without substreams saved the state of a single stream
