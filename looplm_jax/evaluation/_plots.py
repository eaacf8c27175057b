"""PNG figures of depth sweeps, exit curves and training runs, with the optional matplotlib."""

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import Curve, DepthSweep
from looplm_jax.json_io import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#1f5fa8", "#d1495b", "#2e8b57", "#8e5ea2", "#c77d0a", "#3a3a3a")
_GRAY = "#777777"
_MARKERS = "osD^vP"
_DPI = 150


# Figures of evaluations


def plot_depths(sweeps: Mapping[str, DepthSweep], path: Path) -> None:
    """Plots loss and accuracy against loops for one or more labeled models, and marks the trained depth.

    Raises:
      UserError: matplotlib is not installed.
    """
    drawn, (left, right) = figure(columns=2, whole_x=True)
    _curves(left, {label: sweep.curve for label, sweep in sweeps.items()}, "loss")
    _curves(right, {label: sweep.curve for label, sweep in sweeps.items()}, "accuracy")

    for axes in (left, right):
        axes.set_xlabel("loops, T")
        for trained in {sweep.trained_loops for sweep in sweeps.values()}:
            _mark(axes, trained, f"trained: {trained}", height=0.95 if axes is left else 0.05)

    drawn.suptitle("Quality at every depth, held-out text")
    save_figure(drawn, path)


def plot_exits(curves: Mapping[str, Curve], path: Path) -> None:
    """Plots loss and accuracy against mean loops per token, for labeled exit rules.

    Further left and lower loss is better.

    Raises:
      UserError: matplotlib is not installed.
    """
    drawn, (left, right) = figure(columns=2, whole_x=True)
    _curves(left, curves, "loss")
    _curves(right, curves, "accuracy")

    for axes in (left, right):
        axes.set_xlabel("mean loops per token")
    drawn.suptitle("Early exit: quality against compute, held-out text")
    save_figure(drawn, path)


# The figure of a training run


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Panel:
    """A training metric: its name in the rows and its axis label. Lists are drawn as one line per loop."""

    metric: str
    label: str
    log: bool = False


_PANELS = (
    _Panel(metric="loss_per_loop", label="loss (nats/token)"),
    _Panel(metric="mean_exit_loop", label="mean exit loop"),
    _Panel(metric="reward", label="reward"),
    _Panel(metric="share_right", label="share of right answers"),
    _Panel(metric="gradient_norm", label="gradient norm", log=True),
    _Panel(metric="learning_rate", label="learning rate"),
)


def plot_training(rows: Sequence[Mapping[str, Any]], path: Path | io.BytesIO) -> None:
    """Plots the loss of every loop, mean exit loop, reward, gradient norm and learning rate against steps.

    The rows are those of `metrics.jsonl`. Rows of a kind other than `train` are ignored, and metrics that no row has
    are left out.

    Raises:
      UserError: matplotlib is not installed.
    """
    training = [row for row in rows if row.get("kind", "train") == "train"]
    panels = [panel for panel in _PANELS if any(panel.metric in row for row in training)]

    # Rounded up; an empty run still needs a grid.
    drawn, grid = figure(columns=2, rows=max(1, -(-len(panels) // 2)), whole_x=True)
    for axes, panel in zip(grid, panels, strict=False):
        _training_panel(axes, panel, [row for row in training if panel.metric in row])
    # An odd number of panels leaves one of the axes empty.
    for axes in grid[len(panels) :]:
        axes.set_visible(False)

    drawn.suptitle("Training")
    save_figure(drawn, path)


def _training_panel(axes: "Axes", panel: _Panel, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draws one metric."""
    values = [numbers(row[panel.metric]) for row in rows]
    loops = max(len(value) for value in values)
    for loop in range(loops):
        # Stages may have different numbers of loops, so a row may lack the deeper ones.
        points = [(row["step"], value[loop]) for row, value in zip(rows, values, strict=True) if len(value) > loop]
        steps, heights = zip(*points, strict=True)
        color = _COLORS[0] if loops == 1 else _shade(loop, loops)
        axes.plot(steps, heights, color=color, linewidth=1.3, label=f"loop {loop + 1}" if loops > 1 else None)

    axes.set_xlabel("step")
    axes.set_ylabel(panel.label)
    if panel.log:
        axes.set_yscale("log")
    if loops > 1:
        axes.legend(frameon=False)


def _shade(loop: int, loops: int) -> Any:
    """Returns a color that darkens with depth."""
    import matplotlib

    # The lightest colors, above 0.85, are left out.
    return matplotlib.colormaps["viridis"](0.85 * (1 - loop / max(1, loops - 1)))


# Parts of figures


def _curves(axes: "Axes", curves: Mapping[str, Curve], quantity: str) -> None:
    """Draws the labeled curves of one quantity, "loss" or "accuracy"."""
    scale = 100.0 if quantity == "accuracy" else 1.0
    for index, (label, curve) in enumerate(curves.items()):
        axes.plot(
            curve.loops,
            np.multiply(getattr(curve, quantity), scale),
            color=_COLORS[index % len(_COLORS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.6,
            label=label,
        )

    axes.set_ylabel("accuracy (% of tokens)" if quantity == "accuracy" else "loss (nats/token)")
    if len(curves) > 1:
        axes.legend(frameon=False)


def _mark(axes: "Axes", loops: int, text: str, *, height: float) -> None:
    """Draws a labeled vertical line at a number of loops."""
    axes.axvline(loops, color=_GRAY, linestyle="--", linewidth=1.0, zorder=0)
    axes.annotate(
        text,
        xy=(loops, height),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        color=_GRAY,
        fontsize=9,
        verticalalignment="center",
    )


# matplotlib


def require_matplotlib() -> None:
    """Imports matplotlib regardless of MPLBACKEND: figures are written to files, which needs no backend.

    Raises:
      UserError: matplotlib is not installed, or finds no folder to write to.
    """
    # matplotlib imports the backend that the variable names, which may not be installed.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("figures need matplotlib; pip install 'looplm_jax[plot]'") from None
    except OSError as error:
        raise UserError(
            f"figures need matplotlib, which cannot start ({error}); set MPLCONFIGDIR to a folder"
        ) from None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def figure(
    *, columns: int = 1, rows: int = 1, width: float = 4.8, whole_x: bool = False
) -> "tuple[Figure, list[Axes]]":
    """Returns an empty figure and its axes, row by row.

    It is made without pyplot, so that no global state changes and no display is needed.

    Args:
      columns: the number of axes side by side.
      rows: the number of rows of axes.
      width: the width of each of the axes, in inches.
      whole_x: whether ticks of the x axis are whole numbers, as for loops and steps.

    Raises:
      UserError: matplotlib is not installed, or finds no folder to write to.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn = Figure(figsize=(width * columns, 3.6 * rows), layout="constrained")
    grid = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.grid(True, color="#e4e4e4", linewidth=0.8)
        # The grid is behind the curves.
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return drawn, grid


def save_figure(drawn: "Figure", path: Path | io.BytesIO) -> None:
    """Writes a figure as PNG."""
    drawn.savefig(path, dpi=_DPI)
