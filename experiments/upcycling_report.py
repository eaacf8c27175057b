"""The report of the upcycling experiment: a table, a figure, and the numbers behind them."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looplm_jax import json_io
from looplm_jax.errors import UserError
from looplm_jax.evaluation import Table
from looplm_jax.evaluation._plots import require_matplotlib

_FRESH = "-fresh-optimizer"
_COLORS = {"base": "#3a3a3a", "interleave": "#1f5fa8", "stack": "#d1495b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """Held-out losses (nats per token) of one variant, at `steps` since the start of its training."""

    seed: int
    variant: str
    steps: Sequence[int]
    loss_per_loop: Sequence[Sequence[float]]
    expected_loss: Sequence[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """All measurements, and the command that produces them."""

    command: str
    scale: dict[str, Any]
    courses: Sequence[Course]

    @property
    def variants(self) -> list[str]:
        """Returns the variants in the order in which they ran."""
        return list(dict.fromkeys(course.variant for course in self.courses))

    @property
    def steps(self) -> list[int]:
        """Returns the steps at which the loss was measured."""
        return list(self.courses[0].steps)

    @property
    def loops(self) -> int:
        """Returns the trained depth, T."""
        return len(self.courses[0].loss_per_loop[0])

    def expected(self, variant: str) -> np.ndarray:
        """Returns the expected loss over the exit distribution: one row per seed and one column per step."""
        return np.array([course.expected_loss for course in self._of(variant)])

    def after_loop(self, variant: str, loop: int) -> np.ndarray:
        """Returns the loss after a loop, from 1 to T; rows and columns as in `expected`."""
        return np.array([course.loss_per_loop for course in self._of(variant)])[..., loop - 1]

    def _of(self, variant: str) -> list[Course]:
        """Returns the courses of a variant, one per seed."""
        return [course for course in self.courses if course.variant == variant]


# Writing


def write_results(out: Path, results: Results) -> list[str]:
    """Writes `results.json`, `report.md` and, if matplotlib is installed, `upcycling.png`; prints the table.

    Returns the names of the files.
    """
    (out / "results.json").write_text(json_io.dumps(dataclasses.asdict(results), indent=1, default=str) + "\n")

    tables = _tables(results)
    print(f"\n{tables}\n\n{_verdict(results)}")
    figures = _plot(results, out / "upcycling.png")

    sections = [
        "# Upcycling: two orders of the copies",
        _setting(results),
        tables,
        _verdict(results),
        *(f"![{name}]({name})" for name in figures),
        f"`{results.command}`",
    ]

    (out / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return ["results.json", "report.md", *figures]


def _setting(results: Results) -> str:
    """Returns the description of the settings."""
    scale, model = results.scale, results.scale["model"]
    layers = model["num_layers"]
    return (
        f"Base: {layers} layers of width {model['width']}, {model['loops']} loops, {scale['base_steps']} steps of 4 x "
        f"{scale['sequence_length']} tokens at a constant learning rate of {scale['base_learning_rate']:g}; upcycled: "
        f"{2 * layers} layers, trained at {scale['learning_rate']:g}. Losses on {scale['sequences']} held-out "
        f"sequences, mean of {len(scale['seeds'])} seed(s), in nats a token; at step 0, just after upcycling."
    )


def _tables(results: Results) -> str:
    """Returns the tables of all measures."""
    measures: dict[str, Callable[[str], np.ndarray]] = {
        "Expected loss over the exit distribution": results.expected,
        "Loss after loop 1": lambda variant: results.after_loop(variant, 1),
        f"Loss after loop {results.loops}": lambda variant: results.after_loop(variant, results.loops),
    }
    return "\n\n".join(f"{title}:\n\n{_table(results, measure)}" for title, measure in measures.items())


def _table(results: Results, measure: Callable[[str], np.ndarray]) -> str:
    """Returns the table of one measure, averaged over seeds."""
    columns = ("step", *(str(step) for step in results.steps))
    rows = [[name, *(f"{loss:.3f}" for loss in measure(name).mean(axis=0))] for name in results.variants]
    return Table(title="held-out loss", columns=columns, rows=rows).markdown().rstrip("\n")


def _verdict(results: Results) -> str:
    """Returns the comparison of the two orders."""
    # [seeds, steps]
    gap = results.expected("interleave") - results.expected("stack")

    def one(column: int) -> str:
        return ", ".join(f"{value:+.3f}" for value in gap[:, column])

    return (
        f"Expected loss, interleave minus stack, seed by seed: {one(0)} just after upcycling; {one(-1)} after "
        f"{results.steps[-1]} steps with the state of the optimizer."
    )


def _plot(results: Results, path: Path) -> list[str]:
    """Draws the expected loss. Returns the name of the figure, or none if matplotlib is not installed."""
    try:
        require_matplotlib()
    except UserError as error:
        print(error, file=sys.stderr)
        return []

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in results.variants:
        losses, style = results.expected(name), "--" if name.endswith(_FRESH) else "-"
        color = _COLORS[name.removesuffix(_FRESH)]
        axes.plot(results.steps, losses.mean(axis=0), color=color, linestyle=style, marker="o", label=name)
        axes.fill_between(results.steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.12, linewidth=0)

    axes.set_xlabel("steps after upcycling")
    axes.set_ylabel("expected loss (nats/token)")
    axes.set_title("Upcycling, held-out text; bands span the seeds")
    axes.grid(True, color="#e4e4e4")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return [path.name]
