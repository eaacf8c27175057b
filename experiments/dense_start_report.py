"""The report of `dense_start`: held-out loss against steps, and when each start recovers the dense loss."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from looplm_jax import json_io
from looplm_jax.errors import UserError
from looplm_jax.evaluation import Table
from looplm_jax.evaluation._plots import require_matplotlib

_SHOWN_STEPS = (0, 25, 50, 100, 200, 400, 800)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """Held-out loss of every loop (nats per token) at some steps."""

    name: str
    steps: Sequence[int]
    losses: Sequence[Sequence[float]]

    def back(self, target: float, loop: int) -> int | None:
        """Returns the first measured step from which on a loop's loss stays at or below `target`, or None."""
        found = None
        # Backwards, to find the start of the final stretch below the target.
        for step, losses in zip(reversed(self.steps), reversed(self.losses), strict=True):
            # A model with a single loop is compared by that loop at every depth.
            if losses[min(loop, len(losses)) - 1] > target:
                break
            found = step
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The loss of the dense model, and the courses of the other runs."""

    dense_loss: float
    loops: int
    courses: Sequence[Course]


def write_report(out: Path, results: Results) -> list[str]:
    """Writes `results.json`, `report.md`, and the figure if matplotlib is installed. Returns their names."""
    (out / "results.json").write_text(json_io.dumps(dataclasses.asdict(results), indent=1) + "\n")
    figures = _plot(results, out / "dense_start.png")
    text = report(results)
    (out / "report.md").write_text("\n".join([text, *(f"![{name}]({name})\n" for name in figures)]), encoding="utf-8")
    print(text)
    return ["results.json", "report.md", *figures]


def report(results: Results) -> str:
    """Returns tables in Markdown: loss of loop 1, loss of the last loop, and the steps until each has recovered."""
    parts = [f"# A looped model from a dense one\n\nThe dense model: {results.dense_loss:.4f} nats/token, held out.\n"]
    for loop in (1, results.loops):
        parts.append(f"## Loss of loop {loop} after some steps\n\n{_losses(results, loop).markdown()}")
    parts.append(f"## Steps until the loss is back at the dense model's, and stays\n\n{_returns(results).markdown()}")
    return "\n".join(parts)


def _losses(results: Results, loop: int) -> Table:
    """Returns the table of losses of one loop at selected steps."""
    steps = [step for step in _SHOWN_STEPS if any(step in course.steps for course in results.courses)]
    rows = [[course.name, *(_at(course, step, loop) for step in steps)] for course in results.courses]
    return Table(title=f"loop {loop}", columns=("", *map(str, steps)), rows=rows)


def _at(course: Course, step: int, loop: int) -> str:
    """Returns the loss of a loop at a step, or nothing if it was not measured."""
    losses = dict(zip(course.steps, course.losses, strict=True)).get(step)
    return "" if losses is None else f"{losses[min(loop, len(losses)) - 1]:.3f}"


def _returns(results: Results) -> Table:
    """Returns the table of steps until the dense loss is recovered."""
    rows = []
    for course in results.courses:
        found = [course.back(results.dense_loss, loop) for loop in (1, results.loops)]
        rows.append([course.name, *(f"not in {course.steps[-1]}" if step is None else str(step) for step in found)])
    return Table(title="back", columns=("", "loop 1", f"loop {results.loops}"), rows=rows)


def _plot(results: Results, path: Path) -> list[str]:
    """Draws the losses. Returns the name of the figure, or none if matplotlib is not installed."""
    try:
        require_matplotlib()
    except UserError as error:
        print(error, file=sys.stderr)
        return []

    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, loop in zip(figure.subplots(1, 2, sharey=True), (1, results.loops), strict=True):
        for course in results.courses:
            heights = [losses[min(loop, len(losses)) - 1] for losses in course.losses]
            axes.plot(course.steps, heights, linewidth=1.4, label=course.name)
        axes.axhline(results.dense_loss, color="#777777", linestyle="--", linewidth=1.0)
        axes.set_ylim(results.dense_loss - 0.2, results.dense_loss + 1.5)
        axes.set_xlabel("training steps")
        axes.set_title(f"loop {loop}")

    figure.axes[0].set_ylabel("held-out loss (nats/token)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return [path.name]
