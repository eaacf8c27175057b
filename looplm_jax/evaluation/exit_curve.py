"""Loss and accuracy against mean loops: the cost and the savings of early exit (paper v4, Figure 5)."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from looplm_jax.data.packing import Batch
from looplm_jax.evaluation.curves import Curve
from looplm_jax.evaluation.masked_mean import masked_means
from looplm_jax.evaluation.scores import Q_GRID, Scores, scorer
from looplm_jax.models.looplm import LoopLM, Params


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
    score = scorer(model, params, loops=model.config.loops, q_grid=q_grid)
    means = masked_means(score, batches, on_batch)
    return summarise_exits(means.values, q_grid, means.tokens)


def summarise_exits(means: Scores, q_grid: Sequence[float], tokens: int) -> ExitCurve:
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
