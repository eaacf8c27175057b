"""Reachability (paper, B.5, Theorem 2): a looped transformer finds paths in as many loops as their length has bits.

    looplm experiment reachability --scale cpu

Two parts. The construction: the theorem's weights, written by hand (`experiments.reachability_weights`), against
breadth-first search on random digraphs of 2 to 64 nodes, sparse ones, trees and paths, in which the longest shortest
path D runs from 1 to 63 (`experiments.random_digraphs`). All pairs of different nodes of a graph must be told rightly.
Each edge is in the weights or in the context, by a fair coin; and all in the one or the other. Two errors of the print
are measured as well: scores that are zero, and a context without self-loops. The paper prints the theorem and no
experiment: the graphs, their number and their sizes are ours at every scale.

And trained models, all of it ours: k layers looped T times read the edges of three trees in random order and name the
root that reaches a node, 1 to `distance` edges below it (`looplm_jax.data.tasks.reachability`). Naming any root is
right in a third: edges have to be followed to know which. Four questions stand behind each graph in training, the near
ones more often; the test asks one, over each distance, and over one edge more than any in training, where the same
nodes make two longer trees and any root is right in half.

How it was found, with one layer of width 64 at learning rate 3e-3: which nodes are roots is learnt first, without
following an edge, and leaves the less to be won the fewer they are. With two trees, distances 1 to 3 equally often and
weights drawn with deviation 0.02, five loops stayed there: 50 % after 1,500 steps. With three trees, distances 1 and 2
and the near one more often, and deviation 0.125, which is one over the root of the width, four loops learnt to follow
one edge after about 700 steps and two after about 1,200. The other choices were not tried one by one.

`cpu`: 9 nodes, paths of 2 edges, width 64; the records of the runs say how long each cell took. `gpu` and `paper`
have not been run.
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
_TREES = 3  # of a graph, except that the test of a longer path than any in training has two
_FURTHER = ", never trained"


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
        parts = built + ([trained_report(trained, _chances(trained[0]))] if trained else [])
        return Report(
            tables=[table for part in parts for table in part.tables],
            findings=[finding for part in parts for finding in part.findings],
            figures={name: draw for part in parts for name, draw in part.figures.items()},
        )


def _chances(record: Record) -> dict[str, float]:
    """Accuracy of naming any root, by test."""
    return {test: 1 / 2 if test.endswith(_FURTHER) else 1 / _TREES for test in record.result["accuracy"]}


def _problem(distance: int, steps: int) -> Problem:
    nodes = _TREES * (distance + 1)
    task = f"reachability:nodes={nodes},trees={_TREES},distance={distance},asks=root"
    tests = {_edges(asked): f"{task},asked={asked}" for asked in range(1, distance + 1)}
    further = f"reachability:nodes={nodes},trees=2,distance={distance + 1},asks=root"
    tests[f"{_edges(distance + 1)}{_FURTHER}"] = further
    return Problem(task=f"{task},questions=4,nearer=true", tests=tests, steps=steps)


def _edges(number: int) -> str:
    return "1 edge" if number == 1 else f"{number} edges"


_PAPER = Grid(
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
_GPU = Grid(
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
_CPU = Grid(
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
_SMOKE = Grid(
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
