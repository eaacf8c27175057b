"""Experiments on synthetic tasks: k layers looped T times, trained on a task and tested on held-out problems.

Mano, addition, p-hop, three-hop and reachability share these runs, grids, tables and figures.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.reporting import run_speed
from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    MeshConfig,
    ModelConfig,
    Objective,
    OptimizerConfig,
    OptimizerKind,
    Recipe,
    Schedule,
    SourceConfig,
    Stage,
)
from looplm_jax.data.tasks import make_task
from looplm_jax.evaluation import Table, commonest_answer, figure, save_figure, task_accuracy
from looplm_jax.loading import load
from looplm_jax.training._metrics import TRAIN, read_metrics
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import train

# Runs


# Small models learn in jumps, up as well as down, at learning rates too high for large ones, so no spike is skipped.
_NO_SPIKES = GuardConfig(sigma=1e6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskRun:
    """One cell of a grid. `tests` are tasks of the same vocabulary, by name."""

    task: str
    tests: Mapping[str, str]
    layers: int
    loops: int
    width: int
    heads: int
    steps: int
    batch_size: int  # packed sequences
    sequence_length: int
    learning_rate: float
    seed: int
    mlp_width: int = 0  # 0: 8/3 of the width, rounded to a multiple of 16
    beta: float = 0.1
    last_loop_only: bool = False  # use the loss after the last loop alone instead of Eq. 4
    optimizer: str | None = None  # a kind of optimizer; None, as in earlier records: AdamW with the next two
    b2: float = 0.98
    weight_decay: float = 0.1
    warmup_steps: int = 0
    final_share: float = 0.1  # fraction of the peak learning rate at the end of the cosine
    rope_theta: float = 1e4
    init_std: float = 0.02
    test_items: int = 1024

    @property
    def shape(self) -> str:
        """Returns the shape as `k⊗T`, as in the tables."""
        return f"{self.layers}⊗{self.loops}"

    def recipe(self) -> Recipe:
        """Returns the recipe of the run."""
        task = make_task(self.task)
        return Recipe(
            name="task-run",
            seed=self.seed,
            model=ModelConfig(
                vocab_size=task.tokenizer.vocab_size,
                width=self.width,
                mlp_width=self.mlp_width or round(self.width * 8 / 3 / 16) * 16,
                num_layers=self.layers,
                num_heads=self.heads,
                loops=self.loops,
                rope_theta=self.rope_theta,
                max_positions=self.sequence_length,
                init_std=self.init_std,
            ),
            stages=(
                Stage(
                    name="train",
                    steps=self.steps,
                    batch_size=self.batch_size,
                    sequence_length=self.sequence_length,
                    loops=self.loops,
                    objective=Objective.LAST_LOSS if self.last_loop_only else Objective.EXPECTED_LOSS,
                    # A single exit has no entropy.
                    beta=self.beta if self.loops > 1 else 0.0,
                    learning_rate=self.learning_rate,
                    schedule=Schedule.COSINE,
                    warmup_steps=self.warmup_steps,
                    final_learning_rate=self.final_share * self.learning_rate,
                ),
            ),
            mesh=MeshConfig(data=1),
            optimizer=self._optimizer(),
            data=DataConfig(sources=(SourceConfig(path=self.task),), seed=self.seed),
            guard=_NO_SPIKES,
            # Ten saves per run, and about a hundred logged steps.
            checkpoint=CheckpointConfig(every=max(self.steps // 10, 1), keep=1),
            evaluation=EvaluationConfig(sequences=1),
            log_every=max(self.steps // 100, 1),
        )

    def _optimizer(self) -> OptimizerConfig:
        """Returns the optimizer. Adafactor is the one that was published: without weight decay."""
        if self.optimizer is not None:
            return OptimizerConfig(kind=OptimizerKind(self.optimizer), weight_decay=0.0)
        return OptimizerConfig(b2=self.b2, eps=1e-6, weight_decay=self.weight_decay)


def run_task(run: TaskRun, folder: Path, console: Console) -> dict[str, Any]:
    """Trains, or resumes training, and tests at every depth up to twice the trained one.

    Returns:
      shape; accuracy: by test, after each loop; at_trained_depth: by test, after the last trained loop; commonest: by
        test,
      the fraction of the most common answer, which is the accuracy of a constant; curve: step and training loss;
        parameters:
      their number; and the speed of training from `run_speed`.

    Raises:
      Stopped: a signal arrived; calling again resumes.
    """
    outcome = train(run.recipe(), folder, console=console)
    if outcome.stopped_by is not None:
        raise Stopped(outcome.stopped_by)

    loaded = load(folder)
    depth = 2 * run.loops
    tasks = {name: make_task(spec) for name, spec in run.tests.items()}
    accuracy = {
        name: task_accuracy(
            loaded.model, loaded.params, task, loops=depth, items=run.test_items, batch_size=128
        ).tolist()
        for name, task in tasks.items()
    }

    steps = [row for row in read_metrics(folder) if row["kind"] == TRAIN]
    return {
        "shape": run.shape,
        "accuracy": accuracy,
        "at_trained_depth": {name: values[run.loops - 1] for name, values in accuracy.items()},
        "commonest": {name: commonest_answer(task, run.test_items) for name, task in tasks.items()},
        "curve": [[row["step"], row["loss"]] for row in steps],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(loaded.params)),
        **run_speed(folder),
    }


# Grids


Shape = tuple[int, int]  # layers, loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A task to train on, its number of steps, and the tasks of the same vocabulary to test on, by name."""

    task: str
    tests: Mapping[str, str]
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskGrid:
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
    grids: Mapping[Scale, TaskGrid]
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


# Tables and figures


def accuracies(records: Sequence[Record], test: str) -> dict[str, list[float]]:
    """Returns the accuracy after the last trained loop of each seed, by shape."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record.result["shape"], []).append(record.result["at_trained_depth"][test])
    return found


def shape_table(
    records: Sequence[Record], tests: Mapping[str, str], printed: Mapping[str, Mapping[str, float]], title: str
) -> Table:
    """Returns a table with one row per shape: per test, the best seed, mean and range of all, and the published value.

    Args:
      records: the records of a grid.
      tests: the column title of each test, by the name of the test.
      printed: published accuracy in percent, by shape and test.
      title: the title of the table.
    """
    columns = ["layers ⊗ loops", "parameters", "seeds"]
    columns += [f"{name}: {what}" for name in tests.values() for what in ("best", "mean (range)", "printed")]
    sizes = {record.result["shape"]: record.result["parameters"] for record in records}

    rows = []
    for shape, size in sizes.items():
        row = [shape, f"{size:,}", str(sum(record.result["shape"] == shape for record in records))]
        for test in tests:
            values = 100 * np.array(accuracies(records, test)[shape])
            there = printed.get(shape, {}).get(test)
            row += [
                f"{values.max():.1f}",
                f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})",
                "" if there is None else f"{there:.1f}",
            ]
        rows.append(row)

    rows.append(["commonest answer", "", ""] + [cell for test in tests for cell in (_commonest(records, test), "", "")])
    return Table(title=title, columns=columns, rows=rows)


def _commonest(records: Sequence[Record], test: str) -> str:
    """Returns the accuracy of a model that always gives the same answer."""
    return f"{100 * max(record.result['commonest'][test] for record in records):.1f}"


def compare(records: Sequence[Record], test: str, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Returns one sentence per pair of shapes of equal parameters, without and with loops: the gain of looping."""
    found = accuracies(records, test)
    return [
        f"{looped} against {plain} at equal parameters ({test}): {100 * np.mean(found[looped]):.1f} % against "
        f"{100 * np.mean(found[plain]):.1f} % on average over {len(found[looped])} and {len(found[plain])} seeds."
        for plain, looped in pairs
        if plain in found and looped in found
    ]


def plot_curves(records: Sequence[Record], title: str, path: Path) -> None:
    """Plots training loss by step: one line per cell, one color per shape. Raises UserError without matplotlib."""
    made, (axes,) = figure(width=7.0)
    shapes = list(dict.fromkeys(record.result["shape"] for record in records))

    for record in records:
        steps, losses = zip(*record.result["curve"], strict=True)
        shape = record.result["shape"]
        axes.plot(steps, losses, color=f"C{shapes.index(shape)}", alpha=0.8, linewidth=1, label=shape)
    # A dictionary keeps one entry per label.
    # {label: line}
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), title="layers ⊗ loops")
    axes.set(title=title, xlabel="step", ylabel="training loss (nats)")
    save_figure(made, path)


def plot_depths(records: Sequence[Record], test: str, title: str, path: Path) -> None:
    """Plots accuracy by loops, up to twice the trained number: mean over seeds, and their range."""
    made, (axes,) = figure(width=7.0)
    shapes = list(dict.fromkeys(record.result["shape"] for record in records))

    for number, shape in enumerate(shapes):
        runs = np.array([record.result["accuracy"][test] for record in records if record.result["shape"] == shape])
        loops = np.arange(1, runs.shape[1] + 1)
        axes.plot(loops, 100 * runs.mean(0), color=f"C{number}", marker="o", label=shape)
        axes.fill_between(loops, 100 * runs.min(0), 100 * runs.max(0), color=f"C{number}", alpha=0.2, linewidth=0)

    axes.legend(title="layers ⊗ loops")
    axes.set(title=title, xlabel="loops at test", ylabel="exact match (%)", ylim=(0, 101))
    save_figure(made, path)


def curves_and_depths(records: Sequence[Record], tests: Sequence[str], title: str) -> dict[str, Callable[[Path], None]]:
    """Returns the figures that every such grid has, by file name."""
    figures: dict[str, Callable[[Path], None]] = {
        "curves.png": functools.partial(plot_curves, records, f"{title}: training loss")
    }
    for test in tests:
        # The name of a test may have characters that file names should not have.
        name = re.sub(r"[^a-zA-Z0-9=]+", "_", test)
        figures[f"depths_{name}.png"] = functools.partial(plot_depths, records, test, f"{title}, {test}")
    return figures
