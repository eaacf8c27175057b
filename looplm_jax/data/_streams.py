"""Streams of batches whose position is exact and small: prepared sequences, and synthetic tasks.

Text has no class here, because Grain's own iterators have the same interface.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from looplm_jax.data._mixture import TaskSource
from looplm_jax.data._packing import PackedFeatures, pack_problems
from looplm_jax.data.tasks._base import Problems, generator

_READING_THREADS = 16  # reads mostly wait for cloud storage, so there may be more threads than cores
_BATCHES_AHEAD = 2  # batches to prefetch, in addition to the requested one

# The minimum size of a block, in tokens and in sequences. Smaller blocks would waste too much in unfilled sequences.
_BLOCK_TOKENS, _BLOCK_SEQUENCES = 2**17, 128
_BLOCKS_AHEAD = 2  # blocks to generate in advance
_GENERATING_THREADS = 2


@runtime_checkable
class Stream(Protocol):
    """A stream of batches, each a dictionary of arrays named as Grain names packed features."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Returns the features of the next batch."""

    def get_state(self) -> Any:
        """Returns the position after the last returned batch, as plain JSON values."""

    def set_state(self, state: Any) -> None:
        """Moves the stream to a position returned by `get_state`."""

    def close(self) -> None:
        """Stops prefetching."""


# Prepared sequences


class PreparedBatches:
    """An endless stream of batches of prepared sequences, prefetched in order.

    Its state is the number of batches that were returned.

    Args:
      sequences: an endless dataset of sequences, each a dictionary of arrays.
      batch_size: sequences in a batch.
    """

    def __init__(self, sequences: grain.MapDataset, batch_size: int):
        self._sequences, self._batch_size = sequences, batch_size
        self._done = 0
        self._ahead: collections.deque[list[concurrent.futures.Future[Any]]] = collections.deque()

    def __iter__(self) -> "PreparedBatches":
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        # Reads are scheduled here, and not in a thread of their own, so that the stream needs no lock.
        while len(self._ahead) <= _BATCHES_AHEAD:
            self._read_ahead()

        # Results are taken before the batch is removed, so a failed read leaves the position unchanged.
        sequences = [future.result() for future in self._ahead[0]]
        self._ahead.popleft()
        self._done += 1
        return {name: np.stack([each[name] for each in sequences]) for name in sequences[0]}

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
            # Reads that have begun end by themselves; their results are dropped.
            future.cancel()
        self._ahead.clear()

    def _read_ahead(self) -> None:
        """Schedules the reads of the next batch that is not yet prefetched."""
        # Sequences are addressed by index, so the position in the stream determines what to read.
        start = (self._done + len(self._ahead)) * self._batch_size
        places = range(start, start + self._batch_size)
        self._ahead.append([_reading_threads().submit(self._sequences.__getitem__, place) for place in places])


@functools.cache
def _reading_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the thread pool of the process, one for all sources and substreams."""
    return concurrent.futures.ThreadPoolExecutor(_READING_THREADS, thread_name_prefix="sequences")


# Blocks of problems
#
# A block is a few hundred or thousand problems and the sequences that they fill. It is a pure function of the seed and
# the block number, so a stream can resume at any block, and streams that divide the work take disjoint blocks.
# Generating many problems with a few NumPy calls is much cheaper than passing each through a data pipeline as a record.


@dataclasses.dataclass(frozen=True)
class Blocks:
    """All blocks of a mixture of tasks, indexed by number.

    Args:
      tasks: tasks that share one vocabulary. Each block has problems of all of them in proportion to their weights, in
        random order.
      seeds: the seed of each task's stream.
      sequence_length: positions in a sequence.
    """

    tasks: Sequence[TaskSource]
    seeds: Sequence[int]
    sequence_length: int

    def __getitem__(self, block: int) -> PackedFeatures:
        """Returns the packed sequences of a block."""
        return pack_problems(self.problems(block), self.sequence_length)

    def problems(self, block: int) -> Problems:
        """Returns the problems of a block."""
        drawn = []
        before, after = self._drawn(block), self._drawn(block + 1)
        for source, seed, start, end in zip(self.tasks, self.seeds, before, after, strict=True):
            # A task of a small weight has no problem in some blocks.
            if end > start:
                drawn.append(source.task.train_problems(seed, start, end - start))

        # A single task needs no interleaving.
        if len(self.tasks) == 1:
            return drawn[0]
        count = sum(len(problems.lengths) for problems in drawn)
        return Problems.joined(drawn, generator("mixed-problems", *self.seeds, block).permutation(count))

    def _drawn(self, block: int) -> list[int]:
        """Returns, for each task, the number of problems in all earlier blocks."""
        weights = [source.config.weight for source in self.tasks]
        # Rounding cumulative counts, instead of those of each block, keeps the proportions exact over many blocks.
        return [int(block * self._size * (weight / sum(weights))) for weight in weights]

    @functools.cached_property
    def _size(self) -> int:
        """The number of problems in a block."""
        # The longest problem bounds the number of problems that surely fit.
        tokens = max(_BLOCK_TOKENS, _BLOCK_SEQUENCES * self.sequence_length)
        return max(1, tokens // max(source.task.max_tokens for source in self.tasks))


# Batches


class TaskBatches:
    """An endless stream of batches of `batch_size` sequences, generated ahead of time by threads.

    Its state is the block, and the sequence in it, that come next.

    Args:
      blocks: the mixture.
      batch_size: sequences in a batch.
      first: the first block of the stream.
      stride: the distance between consecutive blocks. Streams that divide the work start at `0, 1, …, stride - 1`.
    """

    def __init__(self, blocks: Blocks, batch_size: int, *, first: int = 0, stride: int = 1):
        self._blocks, self._batch_size, self._stride = blocks, batch_size, stride
        self._block, self._sequence = first, 0
        self._ahead: collections.OrderedDict[int, concurrent.futures.Future[PackedFeatures]] = collections.OrderedDict()

    def __next__(self) -> PackedFeatures:
        block, start, taken = self._block, self._sequence, 0
        pieces = []

        # A batch may span several blocks.
        while taken < self._batch_size:
            packed = self._packed(block)
            count = len(packed["tokens"])
            end = min(count, start + self._batch_size - taken)
            pieces.append({name: values[start:end] for name, values in packed.items()})
            taken += end - start
            block, start = (block, end) if end < count else (block + self._stride, 0)

        # The position advances only after all blocks are available. Finished blocks are dropped from the cache.
        self._block, self._sequence = block, start
        while next(iter(self._ahead)) != block and len(self._ahead) > 1:
            self._ahead.popitem(last=False)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last returned batch."""
        return {"block": self._block, "row": self._sequence}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved position."""
        self.close()
        self._block, self._sequence = state["block"], state["row"]

    def close(self) -> None:
        """Cancels the generation of further blocks."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def _packed(self, block: int) -> PackedFeatures:
        """Returns the sequences of a block, and schedules the blocks that follow it."""
        # Futures are cached by block number; a block that is already scheduled is not submitted again.
        for ahead in range(block, block + (_BLOCKS_AHEAD + 1) * self._stride, self._stride):
            # `stride` apart, because the blocks between belong to other streams.
            if ahead not in self._ahead:
                self._ahead[ahead] = _generating_threads().submit(self._blocks.__getitem__, ahead)
        return self._ahead[block].result()


@functools.cache
def _generating_threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the thread pool of the process."""
    return concurrent.futures.ThreadPoolExecutor(_GENERATING_THREADS, thread_name_prefix="problems")
