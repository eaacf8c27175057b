"""Bootstrap intervals: the spread of the numbers over other held-out sequences of the same kind."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

_LEVEL = 0.95


def resamples(rows: int, count: int, seed: int = 0) -> Int[np.ndarray, "R N"]:
    """Returns how often each of `rows` is drawn in each of `count` resamples with replacement."""
    # Drawing rows with replacement gives multinomial counts.
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1.0 / rows), size=count)


def interval(values: ArrayLike) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a resampled statistic."""
    low, high = np.quantile(np.asarray(values, float), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def union(intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the span of all intervals: a conservative interval for several seeds on the same sequences."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)
