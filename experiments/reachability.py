"""Reachability (paper, B.5, Theorem 2): a looped transformer finds paths in as many loops as their length has bits.

    python -m experiments reachability --scale cpu

There are two parts. The construction (`experiments.reachability_construction`): the theorem's weights, set by hand,
against breadth-first search on random digraphs of 2 to 64 nodes: sparse ones, trees and paths, whose longest shortest
path D ranges from 1 to 63. A graph counts as exact if all pairs of different nodes are correct. Each edge is placed in
the weights or in the context at random; there are also variants with all edges in one of them. Two errors of the
published construction are measured as well: scores that are zero, and a context without self-loops. The paper states
the theorem without an experiment: the graphs, their number and their sizes are our choices at every scale.

And trained models, entirely our design: k layers looped T times read the edges of three trees in random order and name
the root from which a node is reachable, 1 to `distance` edges below it (`looplm_jax.data.tasks.Reachability`). Naming
any root is correct in a third of the cases: edges have to be followed to know which. In training, four questions follow
each graph, near ones more often. The test asks one question, at each distance, and at one edge more than in training,
where the same nodes form two longer trees and any root is correct in half of the cases.

How it was found, with one layer of width 64 at learning rate 3e-3: which nodes are roots is learned first, without
following an edge, and the fewer roots there are, the less remains to be gained. With two trees, distances 1 to 3
equally often and initial weights of standard deviation 0.02, five loops stayed there: 50 % after 1,500 steps. With
three trees, distances 1 and 2 with the near one more often, and standard deviation 0.125, one over the square root of
the width, four loops learned to follow one edge after about 700 steps and two after about 1,200. The other choices were
not tried one by one.

`cpu`: 9 nodes, paths of 2 edges, width 64; the records of the runs state how long each cell took. `gpu` and `paper`
have not been run.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.reachability_construction import Construction, try_construction
from experiments.reachability_report import construction_report, trained_report
from experiments.task_grid import Problem, TaskGrid, TaskRun, run_task

_CONSTRUCTION = "construction"
_TREES = 3  # in a graph; the test with a path longer than in training has two
_FURTHER = ", never trained"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReachabilityExperiment:
    """The construction, in one cell, and a grid of trained shapes.

    Args:
      constructions: the construction of each scale.
      grids: the grid of each scale.
    """

    constructions: Mapping[Scale, Construction]
    grids: Mapping[Scale, TaskGrid]
    name: str = "reachability"
    claim: str = "a looped transformer finds paths in as many loops as their length has bits"

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Returns the scales of the grids, smallest first."""
        return tuple(scale for scale in Scale if scale in self.grids)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns the construction, and every trained shape and seed."""
        construction = Cell(name=_CONSTRUCTION, settings=dataclasses.asdict(self.constructions[scale]))
        return construction, *self.grids[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Evaluates the construction, or trains and tests a shape."""
        if cell.name == _CONSTRUCTION:
            return try_construction(Construction(**cell.settings))
        return run_task(TaskRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """Reports both parts, as far as they are finished."""
        built = [construction_report(record.result) for record in records if record.cell == _CONSTRUCTION]
        trained = [record for record in records if record.cell != _CONSTRUCTION]
        parts = built + ([trained_report(trained, _chances(trained[0]))] if trained else [])

        return Report(
            tables=[table for part in parts for table in part.tables],
            findings=[finding for part in parts for finding in part.findings],
            figures={name: draw for part in parts for name, draw in part.figures.items()},
        )


def _chances(record: Record) -> dict[str, float]:
    """Returns the accuracy of naming any root, by test."""
    return {test: 1 / 2 if test.endswith(_FURTHER) else 1 / _TREES for test in record.result["accuracy"]}


def _problem(distance: int, steps: int) -> Problem:
    """Returns the problem of a distance, with a test per distance and one beyond it."""
    # Each tree is a root and `distance` nodes below it.
    nodes = _TREES * (distance + 1)
    task = f"reachability:nodes={nodes},trees={_TREES},distance={distance},asks=root"
    tests = {_edges(asked): f"{task},asked={asked}" for asked in range(1, distance + 1)}

    # The same nodes in two trees: paths are longer, the graph is not.
    further = f"reachability:nodes={nodes},trees=2,distance={distance + 1},asks=root"
    tests[f"{_edges(distance + 1)}{_FURTHER}"] = further
    return Problem(task=f"{task},questions=4,nearer=true", tests=tests, steps=steps)


def _edges(number: int) -> str:
    """Returns a number of edges as text."""
    return "1 edge" if number == 1 else f"{number} edges"


_PAPER = TaskGrid(
    problems={"d8": _problem(8, 100_000)},
    shapes=((1, 1), (1, 10), (10, 1), (2, 1), (2, 5)),
    rates=(3e-4, 1e-3),
    seeds=3,
    settings={
        "width": 512,
        "heads": 8,
        "batch_size": 256,
        "sequence_length": 112,
        "warmup_steps": 1000,
        "init_std": 0.04,
    },
)
_GPU = TaskGrid(
    problems={"d4": _problem(4, 10_000)},
    shapes=((1, 1), (1, 6), (6, 1)),
    rates=(1e-3,),
    seeds=2,
    settings={
        "width": 256,
        "heads": 8,
        "batch_size": 256,
        "sequence_length": 64,
        "warmup_steps": 200,
        "init_std": 0.06,
    },
)
_CPU = TaskGrid(
    problems={"d2": _problem(2, 2_000)},
    shapes=((1, 1), (1, 4), (4, 1)),
    rates=(3e-3,),
    seeds=3,
    settings={
        "width": 64,
        "heads": 4,
        "batch_size": 64,
        "sequence_length": 38,
        "warmup_steps": 50,
        "init_std": 0.125,
    },
)
_SMOKE = TaskGrid(
    problems={"d1": _problem(1, 4)},
    shapes=((1, 2),),
    rates=(1e-3,),
    seeds=1,
    settings={"width": 32, "heads": 2, "batch_size": 4, "sequence_length": 28, "test_items": 64},
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
