"""Scores of every depth from one forward pass, and their means over the tokens of many batches.

The state after loop t does not depend on later loops, so one pass at the greatest depth serves all depths.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from looplm_jax.data._packing import Batch
from looplm_jax.errors import UserError
from looplm_jax.halting import exit_distribution, q_exit
from looplm_jax.losses import token_scores
from looplm_jax.models._looplm import LoopLM, Params, head_matrix
from looplm_jax.sharding import to_host

Q_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


@flax.struct.dataclass
class PerDepth:
    """Loss in nats and correctness at loops 1..T, for each token or, after averaging, for all."""

    loss: Float[Array, "T *BS"]
    correct: Bool[Array, "T *BS"]


@flax.struct.dataclass
class PerExit:
    """Loss and correctness under exits: at the Q-exit loop for each q of a grid, and as an expectation."""

    loss: Float[Array, "Q *BS"]
    correct: Bool[Array, "Q *BS"]
    loops: Int[Array, "Q *BS"]
    pdf: Float[Array, "E *BS"]  # E: the number of loops of the exit distribution
    expected_loss: Float[Array, "*BS"]


@flax.struct.dataclass
class Scores:
    """All scores of a batch."""

    depths: PerDepth
    exits: PerExit


def scorer(
    model: LoopLM, params: Params, *, loops: int | None = None, q_grid: Sequence[float] = Q_GRID
) -> Callable[[Batch], Scores]:
    """Returns a function that scores batches at loops 1..`loops` (default: twice the trained depth).

    Exits are scored up to the trained depth.
    """
    loops = 2 * model.config.loops if loops is None else loops
    # The gate is trained for these loops only.
    exit_loops = min(model.config.loops, loops)
    grid = jnp.asarray(q_grid, jnp.float32)

    def score(batch: Batch) -> Scores:
        return score_tokens(model, params, batch, grid, loops=loops, exit_loops=exit_loops)

    return score


@functools.partial(jax.jit, static_argnames=("model", "loops", "exit_loops"))
def score_tokens(
    model: LoopLM,
    params: Params,
    batch: Batch,
    q_grid: Float[Array, "Q"],
    *,
    loops: int,
    exit_loops: int,
) -> Scores:
    """Scores one batch. Compiles once for all batches of a shape, and for all grids of a length."""
    output: Any = model.apply(
        {"params": params}, batch.tokens, loops=loops, positions=batch.positions, segment_ids=batch.segment_ids
    )
    head = head_matrix(params, model.config)

    scored = token_scores(output.hidden, head, batch.targets, chunk=model.compute.loss_chunk)
    depths = PerDepth(loss=scored.loss, correct=scored.correct)
    return Scores(depths=depths, exits=score_exits(depths, output.gate_logits[:exit_loops], q_grid))


def score_exits(depths: PerDepth, gate_logits: Float[Array, "E *BS"], q_grid: Float[Array, "Q"]) -> PerExit:
    """Returns the scores of the exits that the gates choose.

    `depths` holds the scores of every depth, at least the E loops of the gates.
    """
    pdf = exit_distribution(gate_logits)

    # q_exit returns loops counted from 1.
    loops = jax.vmap(functools.partial(q_exit, pdf))(q_grid)
    return PerExit(
        # loops: [Q, ...], as indices into [T, ...].
        loss=jnp.take_along_axis(depths.loss, loops - 1, axis=0),
        correct=jnp.take_along_axis(depths.correct, loops - 1, axis=0),
        loops=loops,
        pdf=pdf,
        # sum_t p_t L_t over the E loops of the exit distribution.
        expected_loss=jnp.sum(pdf * depths.loss[: pdf.shape[0]], axis=0),
    )


# Means over tokens
#
# Sums are in float64, so that neither the number nor the order of the batches affects the result.


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
        raise UserError("there is no token to evaluate: loss_mask is 0 everywhere; give more documents")
    return MaskedMeans(values=jax.tree.map(lambda total: total / tokens, sums), tokens=tokens)


def _sum(values: Shaped[np.ndarray, "*N B S"], counted: Shaped[np.ndarray, "B S"]) -> Shaped[np.ndarray, "*N"]:
    """Returns the sum over counted tokens."""
    return np.asarray(np.sum(values, axis=(-2, -1), where=counted, dtype=np.float64))
