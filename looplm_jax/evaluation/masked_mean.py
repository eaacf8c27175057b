"""Means over the tokens of many batches, summed in float64 so that neither their number nor their order shows."""

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
    """What was measured, with float64 means `[...]` in the place of arrays `[..., B, S]`, and the number of tokens."""

    values: Any
    tokens: int


def masked_means(
    measure: Callable[[Batch], PyTree],
    batches: Iterable[Batch],
    on_batch: Callable[[], None] | None = None,
) -> MaskedMeans:
    """Mean over all tokens with `loss_mask` of every array that `measure` gives.

    Args:
      measure: arrays `[..., B, S]` in any structure, for a batch.
      batches: what to measure; gone through once.
      on_batch: called after each batch.

    Raises:
      UserError: there is no batch, or no unmasked token in any.
    """
    sums, tokens = None, 0
    for batch in batches:
        counted = np.asarray(batch.loss_mask) > 0
        sums_here = jax.tree.map(lambda x, counted=counted: _sum(x, counted), to_host(measure(batch)))
        sums = sums_here if sums is None else jax.tree.map(np.add, sums, sums_here)
        tokens += int(counted.sum())
        if on_batch is not None:
            on_batch()
    if tokens == 0:
        raise UserError("there is no token to evaluate: the data holds none whose loss_mask is 1; give more documents")
    return MaskedMeans(values=jax.tree.map(lambda total: total / tokens, sums), tokens=tokens)


def _sum(values: Shaped[np.ndarray, "*N B S"], counted: Shaped[np.ndarray, "B S"]) -> Shaped[np.ndarray, "*N"]:
    return np.asarray(np.sum(values, axis=(-2, -1), where=counted, dtype=np.float64))
