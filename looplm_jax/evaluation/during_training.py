"""The evaluation that a training run performs on held-out text."""

from typing import Any

from looplm_jax.data import ValidationBatches
from looplm_jax.evaluation.depth_sweep import depth_sweep
from looplm_jax.models.looplm import LoopLM, Params


def evaluate_held_out(model: LoopLM, params: Params, held_out: ValidationBatches) -> dict[str, Any]:
    """Returns loss (nats per token) and accuracy after each loop up to the trained depth, as lists for the metrics."""
    curve = depth_sweep(model, params, held_out, max_loops=model.config.loops).curve
    return {
        "loss_per_loop": [float(loss) for loss in curve.loss],
        "accuracy_per_loop": [float(accuracy) for accuracy in curve.accuracy],
    }
