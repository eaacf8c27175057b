"""Training batches of synthetic tasks, generated and packed a block at a time.

A block is a few hundred or thousand problems and the sequences that they fill. It is a pure function of the seed and
the block number, so a stream can resume at any block, and streams that divide the work take disjoint blocks. Generating
many problems with a few NumPy calls is much cheaper than passing each of them through a data pipeline as a record.
"""

import collections
import concurrent.futures
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from looplm_jax.data.parts import TaskPart
from looplm_jax.data.tasks.base import Problems
from looplm_jax.data.tasks.draws import generator

Rows = Mapping[str, np.ndarray]
"""Features of packed rows, [R, S] each, named as Grain names those that it packs."""

# The minimum size of a block, in tokens and in sequences. Smaller blocks would waste too much in unfilled sequences.
_BLOCK_TOKENS, _BLOCK_ROWS = 2**17, 128

_OPEN_ROWS = 64  # sequences that are open for packing
_BLOCKS_AHEAD = 2  # blocks to generate in advance
_THREADS = 2


# Blocks of problems


@dataclasses.dataclass(frozen=True)
class Blocks:
    """All blocks of a mixture of tasks, indexed by number.

    Args:
      parts: tasks that share one vocabulary. Each block has problems of all of them in proportion to their weights, in
        random order.
      seeds: the seed of each task's stream.
      sequence_length: positions in a sequence.
    """

    parts: Sequence[TaskPart]
    seeds: Sequence[int]
    sequence_length: int

    def __getitem__(self, block: int) -> Rows:
        """Returns the packed sequences of a block."""
        return pack_problems(self.problems(block), self.sequence_length)

    def problems(self, block: int) -> Problems:
        """Returns the problems of a block."""
        drawn = []
        before, after = self._drawn(block), self._drawn(block + 1)
        for part, seed, start, end in zip(self.parts, self.seeds, before, after, strict=True):
            if end > start:
                drawn.append(part.task.train_problems(seed, start, end - start))

        # A single task needs no interleaving.
        if len(self.parts) == 1:
            return drawn[0]
        count = sum(len(problems.lengths) for problems in drawn)
        return Problems.joined(drawn, generator("mixed-problems", *self.seeds, block).permutation(count))

    def _drawn(self, block: int) -> list[int]:
        """Returns, for each task, the number of problems in all earlier blocks."""
        weights = [part.config.weight for part in self.parts]
        # Rounding cumulative counts, instead of those of each block, keeps the proportions exact over many blocks.
        return [int(block * self._size * (weight / sum(weights))) for weight in weights]

    @functools.cached_property
    def _size(self) -> int:
        """The number of problems in a block."""
        # The longest problem bounds the number of problems that surely fit.
        tokens = max(_BLOCK_TOKENS, _BLOCK_ROWS * self.sequence_length)
        return max(1, tokens // max(part.task.max_tokens for part in self.parts))


# Batches


class TaskBatches:
    """An endless stream of batches of `batch_rows` sequences, generated ahead of time by threads.

    Its state is the block, and the sequence in it, that come next.

    Args:
      blocks: the mixture.
      batch_rows: sequences in a batch.
      first: the first block of the stream.
      stride: the distance between consecutive blocks. Streams that divide the work start at `0, 1, …, stride - 1`.
    """

    def __init__(self, blocks: Blocks, batch_rows: int, *, first: int = 0, stride: int = 1):
        self._blocks, self._batch_rows, self._stride = blocks, batch_rows, stride
        self._block, self._row = first, 0
        self._ahead: collections.OrderedDict[int, concurrent.futures.Future[Rows]] = collections.OrderedDict()

    def __next__(self) -> Rows:
        block, row, taken = self._block, self._row, 0
        pieces = []

        # A batch may span several blocks.
        while taken < self._batch_rows:
            rows = self._rows(block)
            count = len(rows["tokens"])
            end = min(count, row + self._batch_rows - taken)
            pieces.append({name: values[row:end] for name, values in rows.items()})
            taken += end - row
            block, row = (block, end) if end < count else (block + self._stride, 0)

        # The position advances only after all blocks are available. Finished blocks are dropped from the cache.
        self._block, self._row = block, row
        while next(iter(self._ahead)) != block and len(self._ahead) > 1:
            self._ahead.popitem(last=False)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last returned batch."""
        return {"block": self._block, "row": self._row}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved position."""
        self.close()
        self._block, self._row = state["block"], state["row"]

    def close(self) -> None:
        """Cancels the generation of further blocks."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def _rows(self, block: int) -> Rows:
        """Returns the sequences of a block, and schedules the blocks that follow it."""
        # Futures are cached by block number; a block that is already scheduled is not submitted again.
        for ahead in range(block, block + (_BLOCKS_AHEAD + 1) * self._stride, self._stride):
            if ahead not in self._ahead:
                self._ahead[ahead] = _threads().submit(self._blocks.__getitem__, ahead)
        return self._ahead[block].result()


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    """Returns the thread pool of the process."""
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="problems")


# Packing


def pack_problems(problems: Problems, length: int) -> Rows:
    """Packs problems first-fit into R sequences of `length` positions, each problem a segment.

    A problem of n tokens takes n - 1 positions, each with the next token as its target. No problem may be longer than a
    sequence.

    Returns:
      Features of shape [R, S], named as Grain names packed features.
    """
    sizes = problems.lengths - 1
    rows, starts, number, count = _first_fit(sizes.tolist(), length)

    # Indices of all occupied positions, problem by problem: within its problem, in the concatenated tokens, and in the
    # flattened [R * S] output.
    total = int(sizes.sum())
    of_problem = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = np.repeat(np.cumsum(problems.lengths) - problems.lengths, sizes) + of_problem
    place = np.repeat(rows * length + starts, sizes) + of_problem

    def spread(values: np.ndarray, kind: type) -> np.ndarray:
        """Scatters values into the flattened output and reshapes it to [R, S]."""
        row: np.ndarray = np.zeros(count * length, kind)
        row[place] = values
        return row.reshape(count, length)

    return {
        "tokens": spread(problems.tokens[source], np.int32),
        "targets": spread(problems.tokens[source + 1], np.int32),
        "tokens_segment_ids": spread(np.repeat(number, sizes), np.int32),
        "tokens_positions": spread(of_problem, np.int32),
        "loss_mask": spread(problems.loss_mask[source + 1], np.float32),
    }


def _first_fit(
    sizes: Sequence[int], length: int
) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"], Int[np.ndarray, "N"], int]:
    """Assigns each of N sizes to the first open sequence that has room for it.

    Returns:
      For each size, its sequence, its start in the sequence, and its segment number in the sequence, counted from 1;
      and the total number of sequences.
    """
    smallest = min(sizes)
    # Per sequence: occupied positions and number of segments.
    used: list[int] = []
    held: list[int] = []

    open_rows: list[int] = []
    placed: list[tuple[int, int, int]] = []

    for size in sizes:
        row = next((row for row in open_rows if used[row] + size <= length), len(used))

        if row == len(used):
            used.append(0)
            held.append(0)
            open_rows.append(row)
            if len(open_rows) > _OPEN_ROWS:
                open_rows.pop(0)

        held[row] += 1
        placed.append((row, used[row], held[row]))
        used[row] += size
        # Sequences that cannot take even the smallest problem are closed, which keeps the search short.
        if used[row] + smallest > length:
            open_rows.remove(row)

    rows, starts, numbers = np.array(placed).T
    return rows, starts, numbers, len(used)
