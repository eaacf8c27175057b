"""Grids over shapes, k layers looped T times, on a synthetic task: shared by Mano, addition, p-hop and others."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.experiment import Cell, Record, Report, Scale
from experiments.task_report import compare, curves_and_depths, shape_table
from experiments.task_runs import TaskRun, run_task

Shape = tuple[int, int]  # layers, loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task to train on, its number of steps, and the tasks of the same vocabulary to test on, by name."""

    task: str
    tests: Mapping[str, str]
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a scale: every problem, shape, learning rate and seed. `settings` are fields of `TaskRun`."""

    problems: Mapping[str, Problem]
    shapes: Sequence[Shape]
    rates: Sequence[float]
    seeds: int
    settings: Mapping[str, Any]

    def cells(self) -> tuple[Cell, ...]:
        """Returns one cell per run."""
        return tuple(
            Cell(
                name=f"{name}-{layers}x{loops}-lr{rate:g}-seed{seed}",
                settings=dataclasses.asdict(
                    TaskRun(
                        task=problem.task,
                        tests=problem.tests,
                        steps=problem.steps,
                        layers=layers,
                        loops=loops,
                        learning_rate=rate,
                        seed=seed,
                        **self.settings,
                    )
                ),
            )
            for name, problem in self.problems.items()
            for layers, loops in self.shapes
            for rate in self.rates
            for seed in range(self.seeds)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeExperiment:
    """A grid over shapes at all scales.

    Args:
      name: the name that the user types.
      claim: what it tests, in one line.
      title: the title of tables and figures.
      grids: the grid of each scale.
      printed: published accuracy in percent, by shape and test.
      pairs: shapes of equal parameters, without and with loops, that the findings compare.
    """

    name: str
    claim: str
    title: str
    grids: Mapping[Scale, Grid]
    printed: Mapping[str, Mapping[str, float]]
    pairs: Sequence[tuple[str, str]]

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Returns the scales of the grids, smallest first."""
        return tuple(scale for scale in Scale if scale in self.grids)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns the cells of a scale."""
        return self.grids[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains and tests one shape."""
        return run_task(TaskRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """Returns one table per problem, with all of its tests."""
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in records:
            # Problems differ in their tests, which the results name.
            groups.setdefault(tuple(record.result["accuracy"]), []).append(record)

        tables, findings = [], []
        figures: dict[str, Callable[[Path], None]] = {}
        for tests, mine in groups.items():
            title = f"{self.title}: exact match on held-out problems, %"
            tables.append(shape_table(mine, {test: test for test in tests}, self.printed, title))
            findings += [finding for test in tests for finding in compare(mine, test, self.pairs)]
            figures |= curves_and_depths(mine, tests, self.title)

        return Report(tables=tables, findings=findings, figures=figures)
