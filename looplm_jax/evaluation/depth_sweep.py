"""Loss and accuracy at every depth, from one loop to twice the trained depth."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from looplm_jax.data.packing import Batch
from looplm_jax.evaluation.curves import Curve
from looplm_jax.evaluation.masked_mean import masked_means
from looplm_jax.evaluation.scores import PerDepth, scorer
from looplm_jax.models.looplm import LoopLM, Params


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
    score = scorer(model, params, loops=max_loops)
    means = masked_means(lambda batch: score(batch).depths, batches, on_batch)
    return summarise_depths(means.values, model.config.loops, means.tokens)


def summarise_depths(means: PerDepth, trained_loops: int, tokens: int) -> DepthSweep:
    """Returns the sweep for means over tokens."""
    curve = Curve.of(range(1, len(means.loss) + 1), means.loss, means.correct)
    return DepthSweep(curve=curve, trained_loops=trained_loops, tokens=tokens)
