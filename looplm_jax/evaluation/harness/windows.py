"""Converts log-likelihood requests to windows of tokens, and windows to batches of few shapes."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int

from looplm_jax.errors import UserError
from looplm_jax.inference.kv_cache import bucket


@dataclasses.dataclass(frozen=True)
class Window:
    """A sequence of tokens. The last `scored` ones are predicted, each from all tokens before it."""

    tokens: tuple[int, ...]
    scored: int

    @classmethod
    def of(cls, context: Sequence[int], continuation: Sequence[int], longest: int) -> "Window":
        """Returns the continuation after as much of the context's end as a model that reads `longest` tokens can see.

        Raises:
          UserError: the continuation alone is longer.
        """
        if len(continuation) > longest:
            raise UserError(
                f"a continuation of {len(continuation)} tokens does not fit the {longest} that the model reads; "
                "give a larger max_length, or leave the task out"
            )
        # The last token is only predicted, never read, so a window holds one more than the model reads.
        return cls(tokens=(*context, *continuation)[-(longest + 1) :], scored=len(continuation))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowBatch:
    """Windows in one array, padded on the right. A causal model does not see the padding."""

    indices: tuple[int, ...]  # indices of the windows, one per row that is not padding
    tokens: Int[np.ndarray, "B S"]
    read_positions: Int[np.ndarray, "B P"]  # the positions at which scored tokens are predicted
    targets: Int[np.ndarray, "B P"]


def window_batches(windows: Sequence[Window], *, rows: int, longest: int) -> Iterator[WindowBatch]:
    """Yields batches of `rows` windows whose lengths fall into the same buckets, longest first.

    There are as many shapes, and therefore compiled programs, as pairs of buckets. Windows without a scored token are
    left out.
    """
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, window in enumerate(windows):
        # [length of the inputs, number of scored tokens], both rounded up -> indices of windows
        if window.scored:
            alike[bucket(len(window.tokens) - 1, longest), bucket(window.scored, longest)].append(index)

    for (length, scored), indices in sorted(alike.items(), reverse=True):
        for start in range(0, len(indices), rows):
            yield _batch(windows, indices[start : start + rows], (rows, length), (rows, scored))


def _batch(
    windows: Sequence[Window], indices: Sequence[int], shape: tuple[int, int], scored_shape: tuple[int, int]
) -> WindowBatch:
    """Returns one batch, padded to the given shapes."""
    tokens = np.zeros(shape, np.int32)
    read_positions, targets = np.zeros((2, *scored_shape), np.int32)

    for row, index in enumerate(indices):
        *inputs, _ = window = windows[index].tokens
        scored = windows[index].scored
        tokens[row, : len(inputs)] = inputs
        # The token at position p + 1 is predicted at position p.
        read_positions[row, :scored] = np.arange(len(inputs) - scored, len(inputs))
        targets[row, :scored] = window[-scored:]
    return WindowBatch(indices=tuple(indices), tokens=tokens, read_positions=read_positions, targets=targets)
