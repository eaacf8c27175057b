"""Means over the tokens of many batches.

Sums are in float64, so that neither the number nor the order of the batches affects the result.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, Shaped

from looplm_jax.data.packing import Batch
from looplm_jax.errors import UserError
from looplm_jax.sharding import to_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedMeans:
    """The measured values, with float64 means `[...]` instead of arrays `[..., B, S]`, and the number of tokens."""

    values: Any
    tokens: int


def masked_means(
    measure: Callable[[Batch], PyTree],
    batches: Iterable[Batch],
    on_batch: Callable[[], None] | None = None,
) -> MaskedMeans:
    """Returns the mean over all tokens with `loss_mask` of every array that `measure` returns.

    Args:
      measure: returns arrays `[..., B, S]` for a batch, in any tree structure.
      batches: the batches to measure; iterated once.
      on_batch: called after each batch.

    Raises:
      UserError: there is no batch, or no batch has an unmasked token.
    """
    sums, tokens = None, 0
    for batch in batches:
        counted = np.asarray(batch.loss_mask) > 0
        # Reduced batch by batch, so that only one batch of per-token values is in memory.
        sums_here = jax.tree.map(lambda x, counted=counted: _sum(x, counted), to_host(measure(batch)))
        sums = sums_here if sums is None else jax.tree.map(np.add, sums, sums_here)

        tokens += int(counted.sum())
        if on_batch is not None:
            on_batch()

    if tokens == 0:
        raise UserError("there is no token to evaluate: the data holds none whose loss_mask is 1; give more documents")
    return MaskedMeans(values=jax.tree.map(lambda total: total / tokens, sums), tokens=tokens)


def _sum(values: Shaped[np.ndarray, "*N B S"], counted: Shaped[np.ndarray, "B S"]) -> Shaped[np.ndarray, "*N"]:
    """Returns the sum over counted tokens."""
    return np.asarray(np.sum(values, axis=(-2, -1), where=counted, dtype=np.float64))
