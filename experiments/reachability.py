"""Reachability (paper, B.5, Theorem 2): a looped transformer finds paths in as many loops as their length has bits.

    looplm experiment reachability --scale cpu

Two parts. The construction: the theorem's weights, written by hand (`experiments.reachability_weights`), against
breadth-first search on random digraphs of 2 to 64 nodes, sparse ones, trees and paths, in which the longest shortest
path D runs from 1 to 63 (`experiments.random_digraphs`). All pairs of different nodes of a graph must be told rightly.
Each edge is in the weights or in the context, by a fair coin; and all in the one or the other. Two errors of the print
are measured as well: scores that are zero, and a context without self-loops. The paper prints the theorem and no
experiment: the graphs, their number and their sizes are ours at every scale.

And trained models: k layers looped T times read the edges of two trees in random order and name the root that reaches
a node, 1 to `distance` edges below it (`looplm_jax.data.tasks.reachability`). Naming either root gives 50 %: edges
have to be followed to know which. All of it is ours. Four questions stand behind each graph in training, one in the
test. Questions that are answered by yes or no hold the same knowledge, but learn far slower; the task has them too.

`cpu`: 8 nodes, paths of 3 edges, width 64. One cell of the construction takes seconds, a trained one minutes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.experiment import Cell, Record, Report, Scale
from experiments.reachability_construction import Construction, try_construction
from experiments.reachability_report import construction_report, trained_report
from experiments.shape_grid import Grid, Problem
from experiments.task_runs import TaskRun, run_task

_CONSTRUCTION = "construction"
_TREES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReachabilityExperiment:
    """The construction, in one cell, and a grid of trained shapes.

    Args:
      constructions: by scale.
      grids: by scale.
    """

    constructions: Mapping[Scale, Construction]
    grids: Mapping[Scale, Grid]
    name: str = "reachability"
    claim: str = "a looped transformer finds paths in as many loops as their length has bits"

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Those of the grids, the smallest first."""
        return tuple(scale for scale in Scale if scale in self.grids)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """The construction, and every trained shape and seed."""
        construction = Cell(name=_CONSTRUCTION, settings=dataclasses.asdict(self.constructions[scale]))
        return construction, *self.grids[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Try the construction, or train and test a shape."""
        if cell.name == _CONSTRUCTION:
            return try_construction(Construction(**cell.settings))
        return run_task(TaskRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """Of both parts, as far as they are done."""
        built = [construction_report(record.result) for record in records if record.cell == _CONSTRUCTION]
        trained = [record for record in records if record.cell != _CONSTRUCTION]
        parts = built + ([trained_report(trained, chance=1 / _TREES)] if trained else [])
        return Report(
            tables=[table for part in parts for table in part.tables],
            findings=[finding for part in parts for finding in part.findings],
            figures={name: draw for part in parts for name, draw in part.figures.items()},
        )


def _problem(distance: int, steps: int) -> Problem:
    task = f"reachability:nodes={_TREES * (distance + 1)},trees={_TREES},distance={distance},asks=root"
    tests = {_edges(asked): f"{task},asked={asked}" for asked in range(1, distance + 1)}
    return Problem(task=f"{task},questions=4,nearer=true", tests=tests, steps=steps)


def _edges(number: int) -> str:
    return "1 edge" if number == 1 else f"{number} edges"


_PAPER = Grid(
    problems={"d8": _problem(24, 8, 100_000)},
    shapes=((1, 1), (1, 10), (10, 1), (2, 1), (2, 5)),
    rates=(3e-4, 1e-3),
    seeds=3,
    settings={"width": 512, "heads": 8, "batch_size": 256, "sequence_length": 128, "warmup_steps": 1000},
)
_GPU = Grid(
    problems={"d6": _problem(16, 6, 10_000)},
    shapes=((1, 1), (1, 8), (8, 1)),
    rates=(1e-3,),
    seeds=2,
    settings={"width": 256, "heads": 8, "batch_size": 256, "sequence_length": 80, "warmup_steps": 200},
)
_CPU = Grid(
    problems={"d3": _problem(8, 3, 1_500)},
    shapes=((1, 1), (1, 5), (5, 1)),
    rates=(3e-3,),
    seeds=3,
    settings={"width": 64, "heads": 4, "batch_size": 64, "sequence_length": 40, "warmup_steps": 50},
)
_SMOKE = Grid(
    problems={"d1": _problem(4, 1, 4)},
    shapes=((1, 2),),
    rates=(1e-3,),
    seeds=1,
    settings={"width": 32, "heads": 2, "batch_size": 4, "sequence_length": 24, "test_items": 64},
)

REACHABILITY = ReachabilityExperiment(
    constructions=MappingProxyType(
        {
            Scale.SMOKE: Construction(graphs=50, most_nodes=12),
            Scale.CPU: Construction(graphs=1_000, most_nodes=64),
            Scale.GPU: Construction(graphs=1_000, most_nodes=256),
            Scale.PAPER: Construction(graphs=10_000, most_nodes=256),
        }
    ),
    grids=MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU, Scale.GPU: _GPU, Scale.PAPER: _PAPER}),
)
