"""Grids over shapes, k layers looped T times, on a synthetic task: what Mano, addition, p-hop and others share."""

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
    """What is trained on, for how long, and the tasks of the same vocabulary that it is tested on, by name."""

    task: str
    tests: Mapping[str, str]
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What a scale runs: every problem with every shape, learning rate and seed. `settings` are fields of `TaskRun`."""

    problems: Mapping[str, Problem]
    shapes: Sequence[Shape]
    rates: Sequence[float]
    seeds: int
    settings: Mapping[str, Any]

    def cells(self) -> tuple[Cell, ...]:
        """One for each run."""
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
    """Such an experiment at all scales.

    Args:
      name: as it is typed.
      claim: what it tests, in a line.
      title: of tables and figures.
      grids: by scale.
      printed: accuracy in per cent, by shape and test.
      pairs: shapes of equal parameters, without and with loops, that are compared in words.
    """

    name: str
    claim: str
    title: str
    grids: Mapping[Scale, Grid]
    printed: Mapping[str, Mapping[str, float]]
    pairs: Sequence[tuple[str, str]]

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Those of the grids, the smallest first."""
        return tuple(scale for scale in Scale if scale in self.grids)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """The grid at a scale."""
        return self.grids[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Train and test one shape."""
        return run_task(TaskRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """One table for each problem, with all of its tests."""
        groups: dict[tuple[str, ...], list[Record]] = {}
        for record in records:
            groups.setdefault(tuple(record.result["accuracy"]), []).append(record)
        tables, findings = [], []
        figures: dict[str, Callable[[Path], None]] = {}
        for tests, mine in groups.items():
            title = f"{self.title}: exact match on held-out problems, %"
            tables.append(shape_table(mine, {test: test for test in tests}, self.printed, title))
            findings += [finding for test in tests for finding in compare(mine, test, self.pairs)]
            figures |= curves_and_depths(mine, tests, self.title)
        return Report(tables=tables, findings=findings, figures=figures)
