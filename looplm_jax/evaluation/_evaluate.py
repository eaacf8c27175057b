"""Loss and accuracy of a model on batches of text: at every depth, and under early exit."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from looplm_jax.data import ValidationBatches
from looplm_jax.data._packing import Batch
from looplm_jax.evaluation._scores import Q_GRID, PerDepth, Scores, masked_means, scorer
from looplm_jax.models._looplm import LoopLM, Params


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


def _summarize_exits(means: Scores, q_grid: Sequence[float], tokens: int) -> ExitCurve:
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
