"""Tables of evaluations, for a terminal and for Markdown."""

import dataclasses
from collections.abc import Sequence

from rich.table import Table as RichTable

from looplm_jax.evaluation.depth_sweep import DepthSweep
from looplm_jax.evaluation.exit_curve import ExitCurve
from looplm_jax.printing import literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A title, column heads, and rows of text; one row may be marked."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None

    def rich(self) -> RichTable:
        """Returns the table for a terminal; the marked row is bold."""
        table = RichTable(title=literal(self.title), title_justify="left")
        for column in self.columns:
            table.add_column(literal(column), justify="right")
        for index, row in enumerate(self.rows):
            table.add_row(*map(literal, row), style="bold" if index == self.marked else None)
        return table

    def markdown(self) -> str:
        """Returns the table as Markdown, without the title; the marked row is bold."""
        rows = [
            [f"**{cell}**" if cell and index == self.marked else cell for cell in row]
            for index, row in enumerate(self.rows)
        ]
        lines = [self.columns, ["---:"] * len(self.columns), *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def depth_table(sweep: DepthSweep) -> Table:
    """Returns a table with one row per depth; the trained depth is marked."""
    curve = sweep.curve
    rows = [
        [str(int(loops)), f"{loss:.4f}", f"{accuracy:.2%}", _note(int(loops), sweep)]
        for loops, loss, accuracy in zip(curve.loops, curve.loss, curve.accuracy, strict=True)
    ]
    # A sweep may end before the trained depth.
    marked = sweep.trained_loops - 1 if sweep.trained_loops <= len(rows) else None
    return Table(
        title=f"every depth, {sweep.tokens:,} held-out tokens",
        columns=("loops", "loss (nats/token)", "accuracy", ""),
        rows=rows,
        marked=marked,
    )


def _note(loops: int, sweep: DepthSweep) -> str:
    """Returns the note of a depth: trained, best, both, or none."""
    notes = {sweep.best_loops: ["best"]}
    notes.setdefault(sweep.trained_loops, []).insert(0, "trained")
    return ", ".join(notes.get(loops, []))


def exit_table(exits: ExitCurve) -> Table:
    """Returns a table with one row per fixed depth, followed by one per q."""
    labels = [f"loops={int(loops)}" for loops in exits.fixed.loops] + [f"q={q:g}" for q in exits.q_grid]
    points = [
        point
        for curve in (exits.fixed, exits.q_exit)
        for point in zip(curve.loops, curve.loss, curve.accuracy, strict=True)
    ]

    rows = [
        [label, f"{loops:.2f}", f"{loss:.4f}", f"{accuracy:.2%}"]
        for label, (loops, loss, accuracy) in zip(labels, points, strict=True)
    ]

    return Table(
        title="early exit",
        columns=("--exit", "mean loops", "loss (nats/token)", "accuracy"),
        rows=rows,
    )
