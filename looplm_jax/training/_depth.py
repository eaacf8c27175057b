"""The number of loops of a step: fixed, drawn for the step or for each sequence, or growing."""

import numpy as np
from jaxtyping import Int, UInt32

from looplm_jax.config import DepthConfig, DepthKind, DepthPer, Stage


def draw_depths(stage: Stage, key: UInt32[np.ndarray, "2"], step: int, first_step: int) -> Int[np.ndarray, "B"]:
    """Returns the number of loops of each sequence of a step.

    It depends only on the arguments, so it is the same on every process and in a resumed run. It is drawn on the host,
    because fetching it from a device would wait for the running step.

    Args:
      stage: the stage.
      key: the raw random key of the run.
      step: the number of the step.
      first_step: the number of steps of the run before the stage.
    """
    depth = stage.drawn
    match depth.kind:
        case DepthKind.FIXED:
            drawn = np.full(1, stage.loops)
        case DepthKind.GROWING:
            drawn = np.full(1, min(depth.min + (step - first_step) // depth.every, depth.max))
        case _:
            # A generator for each step needs no saved state.
            count = stage.batch_size if depth.per is DepthPer.SEQUENCE else 1
            drawn = _draws(depth, np.random.default_rng([*key, step]), count)

    return np.broadcast_to(drawn.astype(np.int32), (stage.batch_size,))


def grows(stage: Stage, step: int, first_step: int) -> bool:
    """Whether a step has more loops than the one before it in its stage, by the schedule of a growing depth."""
    depth, done = stage.drawn, step - first_step
    return (
        depth.kind is DepthKind.GROWING
        and 0 < done <= (depth.max - depth.min) * depth.every
        and (done % depth.every == 0)
    )


def _draws(depth: DepthConfig, generator: np.random.Generator, count: int) -> Int[np.ndarray, "B"]:
    """Returns independent numbers of loops, clipped to the limits."""
    match depth.kind:
        case DepthKind.UNIFORM:
            return generator.integers(depth.min, depth.max, size=count, endpoint=True)
        case DepthKind.POISSON:
            drawn = 1 + generator.poisson(depth.mean - 1, count)
        case DepthKind.POISSON_LOG_NORMAL:
            # Huginn, arXiv 2502.05171: the mean of the rate is mean - 1.
            drawn = 1 + generator.poisson(_log_normal(generator, depth.mean - 1, depth.sigma, count))
        case DepthKind.LOG_NORMAL:
            drawn = np.rint(_log_normal(generator, depth.mean, depth.sigma, count)).astype(np.int64)
    return np.clip(drawn, depth.min, depth.max)


def _log_normal(generator: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
    """Returns log-normal variables with this mean; `sigma` is the standard deviation of their logarithm."""
    return generator.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
