"""The report of the upcycling experiment: a table, a figure, and the numbers they are made of."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from looplm_jax.evaluation.tables import Table

_COLOURS = {"base": "#3a3a3a", "interleave": "#1f5fa8", "stack": "#d1495b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """Held-out loss after each loop (nats a token) of one variant, by steps since the start of its training."""

    seed: int
    variant: str
    losses: dict[int, list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that was measured, and the command that measures it."""

    command: str
    scale: dict[str, Any]
    courses: Sequence[Course]

    @property
    def variants(self) -> list[str]:
        """In the order in which they ran."""
        return list(dict.fromkeys(course.variant for course in self.courses))

    @property
    def steps(self) -> list[int]:
        """Where the loss was measured."""
        return list(self.courses[0].losses)

    def last_loop(self, variant: str) -> np.ndarray:
        """Loss after the last loop, one row for each seed and one column for each of `steps`."""
        own = [course.losses for course in self.courses if course.variant == variant]
        return np.array([[losses[step][-1] for step in self.steps] for losses in own])


def write_results(out: Path, results: Results) -> list[str]:
    """Write `results.json`, `report.md` and, where matplotlib is installed, `upcycling.png`; print the table.

    Returns their names.
    """
    (out / "results.json").write_text(json.dumps(dataclasses.asdict(results), indent=1, default=str) + "\n")
    table = _table(results).markdown()
    print(f"\n{table}\n{_verdict(results)}")
    figures = _plot(results, out / "upcycling.png")
    sections = [
        "# Upcycling: two orders of the copies",
        _setting(results),
        table.rstrip("\n"),
        _verdict(results),
        *(f"![{name}]({name})" for name in figures),
        f"`{results.command}`",
    ]
    (out / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return ["results.json", "report.md", *figures]


def _setting(results: Results) -> str:
    scale, model = results.scale, results.scale["model"]
    layers = model["num_layers"]
    return (
        f"Base: {layers} layers of width {model['width']}, {model['loops']} loops, {scale['base_steps']} steps of 4 x "
        f"{scale['sequence_length']} tokens; upcycled: {2 * layers} layers. Loss after the last loop on "
        f"{scale['sequences']} held-out sequences, mean of {len(scale['seeds'])} seed(s), in nats a token; column 0 is "
        "just after upcycling, before any step."
    )


def _table(results: Results) -> Table:
    columns = ("trained on", *(f"{step} steps" for step in results.steps))
    rows = [[name, *(f"{loss:.4f}" for loss in results.last_loop(name).mean(axis=0))] for name in results.variants]
    return Table(title="held-out loss", columns=columns, rows=rows)


def _verdict(results: Results) -> str:
    gap = results.last_loop("interleave") - results.last_loop("stack")

    def one(column: int) -> str:
        return ", ".join(f"{value:+.4f}" for value in gap[:, column])

    return (
        f"Interleave minus stack, seed by seed: {one(0)} just after upcycling, {one(-1)} after {results.steps[-1]} "
        "steps with the state of the optimiser."
    )


def _plot(results: Results, path: Path) -> list[str]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("the figure needs matplotlib; pip install 'looplm_jax[plot]'", file=sys.stderr)
        return []
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in results.variants:
        fresh = name.endswith("-fresh-optimizer")
        losses = results.last_loop(name)
        colour, style = _COLOURS[name.removesuffix("-fresh-optimizer")], "--" if fresh else "-"
        axes.plot(results.steps, losses.mean(axis=0), color=colour, linestyle=style, marker="o", label=name)
        axes.fill_between(results.steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.12, linewidth=0)
    axes.set_xlabel("steps after upcycling")
    axes.set_ylabel(f"loss after loop {results.scale['model']['loops']} (nats/token)")
    axes.set_title("Upcycling, held-out text; bands span the seeds")
    axes.grid(True, color="#e4e4e4")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return [path.name]
