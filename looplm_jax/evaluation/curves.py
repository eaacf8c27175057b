"""Quality against loops: the curves that evaluations give."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of rising cost: mean loops a token, mean loss (nats a token), accuracy (0..1)."""

    loops: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]

    @classmethod
    def of(cls, loops: ArrayLike, loss: ArrayLike, accuracy: ArrayLike) -> "Curve":
        """A curve of plain floats, from arrays or sequences of numbers."""
        return cls(
            loops=tuple(np.asarray(loops, float).tolist()),
            loss=tuple(np.asarray(loss, float).tolist()),
            accuracy=tuple(np.asarray(accuracy, float).tolist()),
        )

    @property
    def area(self) -> float:
        """Area under loss against mean loops (trapezia) over the span of loops: nats a token at the average budget."""
        span = self.loops[-1] - self.loops[0]
        if span == 0:
            return self.loss[0]
        return float(np.trapezoid(self.loss, self.loops)) / span

    def to_json(self) -> dict[str, Any]:
        """The points and the area as plain JSON values."""
        return {**{name: list(values) for name, values in dataclasses.asdict(self).items()}, "area": self.area}
