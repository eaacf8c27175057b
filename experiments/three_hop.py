"""Three-hop questions (paper, 6.2 and B.3): with more loops, fewer questions suffice to learn to combine facts.

    python -m experiments three-hop --scale cpu

A model is trained on a part of all questions about a world of people and relations, and tested on 3,000 others (see
`looplm_jax.data.tasks.ThreeHop`). It can answer those only by combining facts that it has seen only inside questions.
The fewer questions it needs for that, the better it learns to combine.

Published, and used at `paper`: 500 people, 20 relations, 6 layers looped 1, 2 and 4 times and 24 layers once (the
operations of 6⊗4), width 1024, 16 heads, learning rate 5e-4, warm-up 1,000, cosine to a tenth, 20,000 steps of 2,048
sequences of 1,024 packed tokens, parts of 2.5 % to 25 % of 800,000 questions, the mean of four seeds. The published
result is a figure; the only numbers in print are the parts it shows (100,000, 120,000 and 140,000). Our choices:
feed-forward width, weight decay 0.1, and Eq. 4 with beta 0.1 on the answer.

`cpu`: a world of 100 people and eight relations, one layer of width 64, supervision of the last loop only, and a
curriculum: two thirds of the training problems ask for one or two hops (`fewest`). A cell takes about 9 minutes with
three loops and 6 without, with three cells running on two cores. From 8,000 questions on, 99.8 % of the other questions
are answered correctly with loops and 31.6 % without (`docs/results.md`). `gpu` has not been run.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.task_grid import Problem, TaskGrid, TaskRun, plot_curves, run_task
from looplm_jax.data.tasks import make_task
from looplm_jax.evaluation import Table, figure, save_figure

TEST = "others"
_LEARNT = 0.9


def _problems(questions: Sequence[int], world: str, steps: int) -> dict[str, Problem]:
    """Returns the problems of training on some numbers of questions."""
    tasks = {count: f"threehop:questions={count}{world}" for count in questions}
    return {f"q{count}": Problem(task=task, tests={TEST: task}, steps=steps) for count, task in tasks.items()}


_PRINTED_SIZE = {"width": 1024, "heads": 16, "sequence_length": 1024, "test_items": 3000, "warmup_steps": 1000}
_PAPER = TaskGrid(
    problems=_problems((20_000, 60_000, 100_000, 120_000, 140_000, 200_000), "", 20_000),
    shapes=((6, 1), (6, 2), (6, 4), (24, 1)),
    rates=(5e-4,),
    seeds=4,
    settings={**_PRINTED_SIZE, "batch_size": 2048},
)
_GPU = TaskGrid(
    problems=_problems((30_000, 60_000, 120_000), "", 2_000),
    shapes=((6, 1), (6, 4)),
    rates=(5e-4,),
    seeds=1,
    settings={**_PRINTED_SIZE, "width": 512, "heads": 8, "batch_size": 64, "warmup_steps": 200},
)
_CPU = TaskGrid(
    problems=_problems((500, 2_000, 8_000), ",people=20,relations=8,validation_items=1000,fewest=1", 5_000),
    shapes=((1, 1), (1, 3)),
    rates=(3e-3,),
    seeds=2,
    settings={
        "width": 64,
        "heads": 4,
        "batch_size": 64,
        "sequence_length": 32,
        "warmup_steps": 50,
        "init_std": 0.125,
        "last_loop_only": True,
        "test_items": 1000,
    },
)
_SMOKE = TaskGrid(
    problems=_problems((100, 200), ",people=6,relations=5,validation_items=64", 4),
    shapes=((1, 1), (1, 2)),
    rates=(1e-3,),
    seeds=1,
    settings={"width": 32, "heads": 2, "batch_size": 4, "sequence_length": 64, "test_items": 64},
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeHopExperiment:
    """Shapes against the number of distinct questions."""

    grids: Mapping[Scale, TaskGrid]
    name: str = "three-hop"
    claim: str = "more loops need fewer different questions to learn to combine three facts"

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Returns the scales of the grids, smallest first."""
        return tuple(scale for scale in Scale if scale in self.grids)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns the cells of a scale."""
        return self.grids[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains one shape on a number of questions, and tests it on others."""
        return run_task(TaskRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """Reports the accuracy by shape and number of questions."""
        found = by_questions(records)
        return Report(
            tables=(_table(found),),
            findings=[_needed(shape, points) for shape, points in found.items()],
            figures={
                "questions.png": functools.partial(_plot, found),
                "curves.png": functools.partial(plot_curves, records, "Three hops: training loss"),
            },
        )


def by_questions(records: Sequence[Record]) -> dict[str, dict[int, list[float]]]:
    """Returns the accuracy on questions outside training for each seed, by shape and number of training questions."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in records:
        questions: int = getattr(make_task(record.settings["task"]), "questions")  # noqa: B009, Task has none
        accuracy = record.result["at_trained_depth"][TEST]
        found.setdefault(record.result["shape"], {}).setdefault(questions, []).append(accuracy)
    return {shape: dict(sorted(points.items())) for shape, points in found.items()}


def _table(found: Mapping[str, Mapping[int, Sequence[float]]]) -> Table:
    """Returns the table of accuracies, one row per shape."""
    questions = sorted({count for points in found.values() for count in points})
    rows = [
        [shape, *(_spread(points[count]) if count in points else "" for count in questions)]
        for shape, points in found.items()
    ]
    return Table(
        title="Exact match on other questions, %: mean (range) over seeds, by the number of different questions seen",
        columns=["layers ⊗ loops", *(f"{count:,}" for count in questions)],
        rows=rows,
    )


def _spread(values: Sequence[float]) -> str:
    """Returns mean and range in percent, as text."""
    percent = 100 * np.array(values)
    return f"{percent.mean():.1f} ({percent.min():.1f} to {percent.max():.1f})"


def _needed(shape: str, points: Mapping[int, Sequence[float]]) -> str:
    """Returns the number of questions from which on a shape answers nearly all others, as a sentence."""
    enough = [count for count, values in points.items() if np.mean(values) >= _LEARNT]
    # The smallest number of questions that suffices.
    if enough:
        return f"{shape} gets {_LEARNT:.0%} right on average from {min(enough):,} questions on."
    best = max(np.mean(values) for values in points.values())
    return f"{shape} gets {_LEARNT:.0%} right with none of these numbers of questions; at most {best:.1%}."


def _plot(found: Mapping[str, Mapping[int, Sequence[float]]], path: Path) -> None:
    """Plots the accuracy by number of questions, one line per shape."""
    made, (axes,) = figure(width=7.0)
    for number, (shape, points) in enumerate(found.items()):
        values = [100 * np.array(points[count]) for count in points]
        axes.plot(list(points), [each.mean() for each in values], color=f"C{number}", marker="o", label=shape)
        low, high = [each.min() for each in values], [each.max() for each in values]
        axes.fill_between(list(points), low, high, color=f"C{number}", alpha=0.2, linewidth=0)
    axes.legend(title="layers ⊗ loops")
    axes.set(title="Three hops", xlabel="different questions", ylabel="exact match on others (%)", ylim=(0, 101))
    save_figure(made, path)


THREE_HOP = ThreeHopExperiment(
    grids=MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU, Scale.GPU: _GPU, Scale.PAPER: _PAPER}),
)
