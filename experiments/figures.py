"""An empty figure in the style of the evaluations, for experiments that draw their own."""

from pathlib import Path
from typing import Any

from looplm_jax.evaluation.plots import require_matplotlib


def figure(columns: int = 1, width: float = 4.8) -> tuple[Any, list[Any]]:
    """Returns a figure and its axes, side by side, without pyplot. Raises UserError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, 3.8), layout="constrained")
    grid = list(made.subplots(1, columns, squeeze=False).flat)
    for axes in grid:
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return made, grid


def save(made: Any, path: Path) -> None:
    """Writes the figure as PNG."""
    made.savefig(path, dpi=150)
