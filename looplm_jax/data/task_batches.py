"""Training batches of synthetic tasks: problems are drawn, and packed into rows, a block at a time.

A block is a few hundred or thousand problems and the rows that they fill. It is a pure function of the seed and its
number, so a stream resumes anywhere, and streams that share the work take blocks of their own. Drawing many problems in
a few calls of NumPy costs a small part of what a record of a pipeline costs for each.
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

_BLOCK_TOKENS, _BLOCK_ROWS = 2**17, 128  # at least one of them, or the last row of a block wastes too much
_OPEN_ROWS = 64
_BLOCKS_AHEAD = 2
_THREADS = 2


@dataclasses.dataclass(frozen=True)
class Blocks:
    """All blocks of a mixture of tasks, by number.

    Args:
      parts: tasks of one vocabulary; by their weights each block has problems of all, in random order.
      seeds: seed of each part's stream.
      sequence_length: positions of a row.
    """

    parts: Sequence[TaskPart]
    seeds: Sequence[int]
    sequence_length: int

    def __getitem__(self, block: int) -> Rows:
        """Returns the rows of a block."""
        return pack_problems(self.problems(block), self.sequence_length)

    def problems(self, block: int) -> Problems:
        """Returns the problems of a block."""
        drawn = []
        before, after = self._drawn(block), self._drawn(block + 1)
        for part, seed, start, end in zip(self.parts, self.seeds, before, after, strict=True):
            if end > start:
                drawn.append(part.task.train_problems(seed, start, end - start))
        if len(self.parts) == 1:
            return drawn[0]
        count = sum(len(problems.lengths) for problems in drawn)
        return Problems.joined(drawn, generator("mixed-problems", *self.seeds, block).permutation(count))

    def _drawn(self, block: int) -> list[int]:
        """Returns how many problems of each part the blocks before this one hold."""
        weights = [part.config.weight for part in self.parts]
        return [int(block * self._size * (weight / sum(weights))) for weight in weights]

    @functools.cached_property
    def _size(self) -> int:
        """Problems of a block."""
        tokens = max(_BLOCK_TOKENS, _BLOCK_ROWS * self.sequence_length)
        return max(1, tokens // max(part.task.max_tokens for part in self.parts))


class TaskBatches:
    """An endless stream of batches of `batch_rows` rows, made ahead by threads.

    Its state is the block and the row in it that come next.

    Args:
      blocks: the mixture.
      batch_rows: rows of a batch.
      first: block that the stream begins with.
      stride: how far the next block is; streams that share the work begin with `0, 1, …, stride - 1`.
    """

    def __init__(self, blocks: Blocks, batch_rows: int, *, first: int = 0, stride: int = 1):
        self._blocks, self._batch_rows, self._stride = blocks, batch_rows, stride
        self._block, self._row = first, 0
        self._ahead: collections.OrderedDict[int, concurrent.futures.Future[Rows]] = collections.OrderedDict()

    def __next__(self) -> Rows:
        block, row, taken = self._block, self._row, 0
        pieces = []
        while taken < self._batch_rows:
            rows = self._rows(block)
            count = len(rows["tokens"])
            end = min(count, row + self._batch_rows - taken)
            pieces.append({name: values[row:end] for name, values in rows.items()})
            taken += end - row
            block, row = (block, end) if end < count else (block + self._stride, 0)
        self._block, self._row = block, row
        while next(iter(self._ahead)) != block and len(self._ahead) > 1:
            self._ahead.popitem(last=False)
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def get_state(self) -> dict[str, int]:
        """Returns the place after the batch handed out last."""
        return {"block": self._block, "row": self._row}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues there."""
        self.close()
        self._block, self._row = state["block"], state["row"]

    def close(self) -> None:
        """Makes no more blocks ahead."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def _rows(self, block: int) -> Rows:
        for ahead in range(block, block + (_BLOCKS_AHEAD + 1) * self._stride, self._stride):
            if ahead not in self._ahead:
                self._ahead[ahead] = _threads().submit(self._blocks.__getitem__, ahead)
        return self._ahead[block].result()


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="problems")


def pack_problems(problems: Problems, length: int) -> Rows:
    """Returns rows of `length` positions that hold the problems, each a segment, packed first-fit.

    A problem of n tokens takes n - 1 positions, each with the next token as its target; none is longer than a row.
    """
    sizes = problems.lengths - 1
    rows, starts, number, count = _first_fit(sizes.tolist(), length)
    total = int(sizes.sum())
    of_problem = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = np.repeat(np.cumsum(problems.lengths) - problems.lengths, sizes) + of_problem
    place = np.repeat(rows * length + starts, sizes) + of_problem

    def spread(values: np.ndarray, kind: type) -> np.ndarray:
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
    """Returns the row of each size, where in the row it begins, which of the row's it is from 1, and how many rows
    there are. A size goes to the first of the open rows that has room for it.
    """
    smallest = min(sizes)
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
        if used[row] + smallest > length:
            open_rows.remove(row)
    rows, starts, numbers = np.array(placed).T
    return rows, starts, numbers, len(used)
