"""Loss and accuracy of a model on batches of text: at every depth, and under early exit.

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
from numpy.typing import ArrayLike

from looplm_jax.data import ValidationBatches
from looplm_jax.data._packing import Batch
from looplm_jax.errors import UserError
from looplm_jax.halting import exit_distribution, q_exit
from looplm_jax.losses import token_scores
from looplm_jax.models._looplm import LoopLM, Params, head_matrix
from looplm_jax.sharding import to_host

Q_GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


# Scores of every token, from one forward pass


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
class LoopScores:
    """All scores of a batch."""

    depths: PerDepth
    exits: PerExit


def scorer(
    model: LoopLM, params: Params, *, loops: int | None = None, q_grid: Sequence[float] = Q_GRID
) -> Callable[[Batch], LoopScores]:
    """Returns a function that scores batches at loops 1..`loops` (default: twice the trained depth).

    Exits are scored up to the trained depth.
    """
    loops = model.config.deeper_loops if loops is None else loops
    # The gate is trained for these loops only.
    exit_loops = min(model.config.loops, loops)
    grid = jnp.asarray(q_grid, jnp.float32)

    def score(batch: Batch) -> LoopScores:
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
) -> LoopScores:
    """Scores one batch. Compiles once for all batches of a shape, and for all grids of a length."""
    output: Any = model.apply(
        {"params": params}, batch.tokens, loops=loops, positions=batch.positions, segment_ids=batch.segment_ids
    )
    head = head_matrix(params, model.config)

    scored = token_scores(output.hidden, head, batch.targets, chunk=model.compute.loss_chunk)
    depths = PerDepth(loss=scored.loss, correct=scored.correct)
    return LoopScores(depths=depths, exits=score_exits(depths, output.gate_logits[:exit_loops], q_grid))


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


# Curves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Points in order of rising cost: mean loops per token, mean loss (nats per token), and accuracy (0 to 1)."""

    loops: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @classmethod
    def of(cls, loops: ArrayLike, loss: ArrayLike, accuracy: ArrayLike) -> "Curve":
        """Returns a curve of plain floats, from arrays or sequences of numbers."""
        return cls(
            loops=tuple(np.asarray(loops, float).tolist()),
            loss=tuple(np.asarray(loss, float).tolist()),
            accuracy=tuple(np.asarray(accuracy, float).tolist()),
        )

    @property
    def area(self) -> float:
        """Returns the area under loss against mean loops (trapezoidal rule), divided by the span of loops.

        It is the loss in nats per token, averaged over budgets of loops.
        """
        span = self.loops[-1] - self.loops[0]
        # A model with a single loop has a curve of one point.
        if span == 0:
            return self.loss[0]
        return float(np.trapezoid(self.loss, self.loops)) / span

    def to_json(self) -> dict[str, Any]:
        """Returns the points and the area as plain JSON values."""
        return {**{name: list(values) for name, values in dataclasses.asdict(self).items()}, "area": self.area}


# Every depth, from one loop to twice the trained depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthSweep:
    """The result of stopping every token at loop 1, at loop 2, and so on."""

    curve: Curve
    trained_loops: int
    tokens: int  # the number of tokens that the means are over

    @property
    def best_loops(self) -> int:
        """Returns the depth with the lowest loss."""
        return int(self.curve.loops[int(np.argmin(self.curve.loss))])

    def to_json(self) -> dict[str, Any]:
        """Returns the sweep as plain JSON values."""
        return {"trained_loops": self.trained_loops, "tokens": self.tokens, **self.curve.to_json()}


def depth_sweep(
    model: LoopLM,
    params: Params,
    batches: Iterable[Batch],
    *,
    max_loops: int | None = None,
    on_batch: Callable[[], None] | None = None,
) -> DepthSweep:
    """Returns mean loss and accuracy at loops 1..`max_loops` (default: twice the trained depth), from one pass.

    Raises:
      UserError: `max_loops` is below one, or there is no token to evaluate.
    """
    # Exits are scored by the same pass, and dropped here.
    score = scorer(model, params, loops=max_loops)

    means = masked_means(lambda batch: score(batch).depths, batches, on_batch)
    return _summarize_depths(means.values, model.config.loops, means.tokens)


def _summarize_depths(means: PerDepth, trained_loops: int, tokens: int) -> DepthSweep:
    """Returns the sweep for means over tokens."""
    curve = Curve.of(range(1, len(means.loss) + 1), means.loss, means.correct)
    return DepthSweep(curve=curve, trained_loops=trained_loops, tokens=tokens)


# Early exit: loss and accuracy against mean loops (paper v4, Figure 5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitCurve:
    """Two curves from one loop to T: exits at fixed depths 1..T, and Q-exits for a rising grid of q."""

    fixed: Curve
    q_exit: Curve
    q_grid: tuple[float, ...]
    exit_pdf: tuple[float, ...]  # mean exit distribution over loops 1..T
    expected_loss: float  # mean of sum_t p_t L_t, nats per token
    mean_exit_loop: float  # mean of sum_t t p_t
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """Returns the curves as plain JSON values."""
        return {
            "tokens": self.tokens,
            "fixed": self.fixed.to_json(),
            "q_exit": {"q": list(self.q_grid), **self.q_exit.to_json()},
            "exit_pdf": list(self.exit_pdf),
            "expected_loss": self.expected_loss,
            "mean_exit_loop": self.mean_exit_loop,
        }


def exit_curve(
    model: LoopLM,
    params: Params,
    batches: Iterable[Batch],
    *,
    q_grid: Sequence[float] = Q_GRID,
    on_batch: Callable[[], None] | None = None,
) -> ExitCurve:
    """Compares fixed depths with Q-exit at rising values of q, up to the trained depth.

    Raises:
      UserError: there is no token to evaluate.
    """
    # The gate has learned nothing about loops beyond the trained depth.
    score = scorer(model, params, loops=model.config.loops, q_grid=q_grid)

    means = masked_means(score, batches, on_batch)
    return _summarize_exits(means.values, q_grid, means.tokens)


def _summarize_exits(means: LoopScores, q_grid: Sequence[float], tokens: int) -> ExitCurve:
    """Returns the curves for means over tokens. Fixed depths end where the exit distribution ends."""
    exits, depths = means.exits, means.depths
    fixed = np.arange(1, len(exits.pdf) + 1)
    return ExitCurve(
        # Depths may go beyond the trained one, gates do not.
        fixed=Curve.of(fixed, depths.loss[: fixed.size], depths.correct[: fixed.size]),
        q_exit=Curve.of(exits.loops, exits.loss, exits.correct),
        q_grid=tuple(float(q) for q in q_grid),
        exit_pdf=tuple(float(p) for p in exits.pdf),
        expected_loss=float(exits.expected_loss),
        # sum_t t p_t; `fixed` holds the loops 1..T.
        mean_exit_loop=float(np.dot(fixed, exits.pdf)),
        tokens=tokens,
    )


# Both, with one forward pass per batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result that `looplm evaluate` reports."""

    depths: DepthSweep
    exits: ExitCurve

    def to_json(self) -> dict[str, Any]:
        """Returns the evaluation as plain JSON values."""
        return {"depths": self.depths.to_json(), "exits": self.exits.to_json()}


def evaluate(
    model: LoopLM,
    params: Params,
    batches: Iterable[Batch],
    *,
    max_loops: int | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluates every depth 1..`max_loops` (default: twice the trained depth), and exits up to the trained depth.

    Raises:
      UserError: `max_loops` is below one, or there is no token to evaluate.
    """
    # One pass over the batches serves both: scores hold depths and exits.
    means = masked_means(scorer(model, params, loops=max_loops), batches, on_batch)
    return Evaluation(
        depths=_summarize_depths(means.values.depths, model.config.loops, means.tokens),
        exits=_summarize_exits(means.values, Q_GRID, means.tokens),
    )


# During training


def evaluate_held_out(model: LoopLM, params: Params, held_out: ValidationBatches) -> dict[str, Any]:
    """Returns loss (nats per token) and accuracy after each loop up to the trained depth, as lists for the metrics."""
    curve = depth_sweep(model, params, held_out, max_loops=model.config.loops).curve
    return {
        "loss_per_loop": [float(loss) for loss in curve.loss],
        "accuracy_per_loop": [float(accuracy) for accuracy in curve.accuracy],
    }
