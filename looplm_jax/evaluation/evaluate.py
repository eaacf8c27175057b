"""Depth sweep and exit curve of a model on one set of batches, with one forward pass per batch."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from looplm_jax.data.packing import Batch
from looplm_jax.evaluation.depth_sweep import DepthSweep, summarise_depths
from looplm_jax.evaluation.exit_curve import ExitCurve, summarise_exits
from looplm_jax.evaluation.masked_mean import masked_means
from looplm_jax.evaluation.scores import Q_GRID, scorer
from looplm_jax.models.looplm import LoopLM, Params


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
        depths=summarise_depths(means.values.depths, model.config.loops, means.tokens),
        exits=summarise_exits(means.values, Q_GRID, means.tokens),
    )
