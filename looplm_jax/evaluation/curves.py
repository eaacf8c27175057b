"""Curves of quality against loops, the result of evaluations."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


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
