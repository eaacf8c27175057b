"""Dense start: how far a looped model that starts from a dense one is from its loss, and when training recovers it.

    python -m experiments dense-start --scale cpu

Trains a dense model on the source of the local Python's standard library, writes it as a Llama folder, converts that
with norm placement `pre` and `sandwich` at T = 4, and trains each start with Stage I. For comparison it trains a looped
model from scratch, and continues the dense model. Two more starts change the second norms of the sandwich to reduce its
loss: small ones, which make a loop nearly the identity, and ones that match the dense model's branches
(`dense_models`).

A cell is one of these runs; every loss is on the same held-out text. The cells share the folder `shared`, which holds
the dense model and the starts; the first cell makes them. `docs/dense_start.md` has the results at `cpu`, whose records
have neither times nor versions: they were converted from an earlier format.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.dense_models import matched_scales, with_second_norms, write_llama
from experiments.frame import Cell, Record, Report, Scale
from experiments.text_models import TextModels, alone, train_and_evaluate
from looplm_jax.codec import override
from looplm_jax.config import CheckpointConfig, EvaluationConfig, NormPlacement, Recipe, SourceConfig, StartConfig
from looplm_jax.convert import convert_from_dense
from looplm_jax.evaluation import Table, evaluate_held_out, figure, save_figure
from looplm_jax.recipes import named_recipe

_LOOPS = 4
_SMALL_NORM = 0.1
_SHOWN_STEPS = (0, 25, 50, 100, 200, 400, 800)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: its start, and its differences from the others.

    Attributes:
      name: the name in the results.
      start: a folder below the shared one; empty: initial parameters.
      placement: the value of a `NormPlacement`.
      loops: T.
      learning_rate: the peak learning rate.
    """

    name: str
    start: str = ""
    placement: str = NormPlacement.SANDWICH.value
    loops: int = _LOOPS
    learning_rate: float = 5e-4

    @property
    def folder(self) -> str:
        """Returns the name as that of a folder."""
        return self.name.replace(", ", "-").replace(" ", "-")


DENSE = Run(name="dense", placement=NormPlacement.PRE.value, loops=1, learning_rate=1.5e-3)
TRAINED_ON = Run(name="dense, trained on", start="dense", placement=NormPlacement.PRE.value, loops=1)
PRE = Run(name="pre", start="starts/pre", placement=NormPlacement.PRE.value)
SANDWICH = Run(name="sandwich", start="starts/sandwich")
MATCHED = Run(name="sandwich, matched norms", start="starts/matched")
SMALL = Run(name="sandwich, small norms", start="starts/small")
SCRATCH = Run(name="looped from scratch", learning_rate=1.5e-3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """The size of all runs.

    Attributes:
      dense_steps: the steps of the dense model.
      steps: the steps of every other run.
      every: the steps between evaluations.
      sequences: the number of held-out sequences.
      changes: new values of recipe fields, by their dotted paths.
    """

    dense_steps: int
    steps: int
    every: int
    sequences: int
    changes: Mapping[str, Any]


# The grid


_CPU = Size(dense_steps=1500, steps=800, every=25, sequences=64, changes={"model.num_layers": 2})
_SMOKE = Size(
    dense_steps=6,
    steps=4,
    every=2,
    sequences=4,
    changes={
        "model.vocab_size": 384,
        "model.width": 32,
        "model.mlp_width": 48,
        "stage.batch_size": 2,
        "stage.sequence_length": 64,
        "mesh.data": 1,
        "data.validation_fraction": 0.3,
    },
)
_GRIDS: Mapping[Scale, tuple[Size, Sequence[Run]]] = MappingProxyType(
    {
        Scale.SMOKE: (_SMOKE, (PRE, MATCHED, SCRATCH)),
        Scale.CPU: (_CPU, (TRAINED_ON, PRE, SANDWICH, MATCHED, SMALL, SCRATCH)),
    }
)


class DenseStart:
    """The dense-start experiment."""

    name = "dense-start"
    claim = "a looped model can start from a dense one: the loss that each start costs, and the steps until it is back"
    scales = tuple(_GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per run."""
        size, runs = _GRIDS[scale]
        return tuple(
            Cell(name=run.folder, settings={"run": dataclasses.asdict(run), "size": dataclasses.asdict(size)})
            for run in runs
        )

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Makes the dense model and the starts, unless they are there, trains the run, and returns its losses."""
        work = _Work(
            size=Size(**cell.settings["size"]),
            documents=TextModels.beside(folder, self.name, console).stdlib(),
            # The results folder has `cells/CELL`.
            shared=folder.parent.parent / "shared",
            console=console,
        )

        dense = work.dense()
        work.make_starts()
        run = Run(**cell.settings["run"])
        rows = work.train(run, folder / "run")
        return {
            "name": run.name,
            "dense_loss": dense[-1]["loss_per_loop"][0],
            "loops": _LOOPS,
            "steps": [row["step"] for row in rows],
            "losses": [row["loss_per_loop"] for row in rows],
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns the losses of the first and the last loop, the steps until each has recovered, and the figure."""
        # The same dense model in all cells.
        dense_loss, loops = records[0].result["dense_loss"], records[0].result["loops"]
        courses = [
            Course(**{field: record.result[field] for field in ("name", "steps", "losses")}) for record in records
        ]

        return Report(
            tables=[*(_losses(courses, loop) for loop in (1, loops)), _returns(courses, dense_loss, loops)],
            findings=[f"The dense model: {dense_loss:.4f} nats/token, held out."],
            figures={"dense-start.png": functools.partial(_plot, courses, dense_loss, loops)},
        )


# The runs of a cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """A cell that runs: the size, the documents, and the folder that all cells share."""

    size: Size
    documents: Path
    shared: Path
    console: Console

    def train(self, run: Run, folder: Path) -> Sequence[Mapping[str, Any]]:
        """Trains a run, unless it is trained. Returns its evaluations."""
        return train_and_evaluate(self._recipe(run), folder, self.console, evaluate_held_out)

    def dense(self) -> Sequence[Mapping[str, Any]]:
        """Trains the dense model, unless it is trained. Returns its evaluations."""
        with alone(self.shared, DENSE.folder, self.console):
            return self.train(DENSE, self.shared / DENSE.folder)

    def make_starts(self) -> None:
        """Writes the trained dense model as a Llama folder, and every checkpoint that a run starts from."""
        starts = self.shared / "starts"
        with alone(self.shared, "starts", self.console):
            if not self._llama.exists():
                write_llama(self.shared / DENSE.folder, self._llama)

            for placement in (NormPlacement.PRE, NormPlacement.SANDWICH):
                if not (starts / placement.value).exists():
                    convert_from_dense(self._llama, starts / placement.value, loops=_LOOPS, norm_placement=placement)

            if not (starts / "small").exists():
                convert_from_dense(
                    self._llama,
                    starts / "small",
                    loops=_LOOPS,
                    norm_placement=NormPlacement.SANDWICH,
                    second_norm=_SMALL_NORM,
                )

            # Last, because it uses the checkpoints of both placements.
            if not (starts / "matched").exists():
                scales = matched_scales(starts / "pre", self._recipe(PRE))
                with_second_norms(starts / "sandwich", starts / "matched", scales)

    @property
    def _llama(self) -> Path:
        """Returns the folder of the dense model as a Llama."""
        return self.shared / "llama"

    def _recipe(self, run: Run) -> Recipe:
        """Returns the recipe of a run."""
        steps = self.size.dense_steps if run == DENSE else self.size.steps
        recipe = named_recipe("demo-one-loop" if run.loops == 1 else "demo")
        stage = dataclasses.replace(
            recipe.stages[0],
            steps=steps,
            learning_rate=run.learning_rate,
            warmup_steps=steps // 40,
            decay_steps=steps // 4,
            final_learning_rate=run.learning_rate / 10,
        )

        sources = (SourceConfig(path=str(self.documents)),)
        # A start has its own tokenizer, and the dense run trains one; only a run from scratch needs a path.
        tokenizer = "" if run.start or run == DENSE else str(self._llama / "tokenizer.json")
        recipe = dataclasses.replace(
            recipe,
            name=run.name,
            description="",
            model=dataclasses.replace(recipe.model, norm_placement=NormPlacement(run.placement)),
            stages=(stage,),
            # One seed for the dense model, another for all later runs, which read the data in a new order.
            data=dataclasses.replace(recipe.data, sources=sources, tokenizer=tokenizer, seed=int(run != DENSE)),
            start=StartConfig(checkpoint=str(self.shared / run.start) if run.start else ""),
            checkpoint=CheckpointConfig(every=200, keep=1),
            evaluation=EvaluationConfig(every=self.size.every, sequences=self.size.sequences),
        )
        return override(recipe, self.size.changes)


# Reporting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """Held-out loss of every loop (nats per token) at some steps."""

    name: str
    steps: Sequence[int]
    losses: Sequence[Sequence[float]]

    def after_loop(self, loop: int) -> list[float]:
        """Returns the loss of a loop at every step; a model with a single loop has the same at every depth."""
        return [losses[min(loop, len(losses)) - 1] for losses in self.losses]

    def back(self, target: float, loop: int) -> int | None:
        """Returns the first measured step from which on a loop's loss stays at or below `target`, or None."""
        found = None
        # Backwards, to find the start of the final stretch below the target.
        for step, loss in zip(reversed(self.steps), reversed(self.after_loop(loop)), strict=True):
            if loss > target:
                break
            found = step
        return found


def _losses(courses: Sequence[Course], loop: int) -> Table:
    """Returns the table of losses of one loop at selected steps."""
    steps = [step for step in _SHOWN_STEPS if any(step in course.steps for course in courses)]
    rows = [[course.name, *(_at(course, step, loop) for step in steps)] for course in courses]
    title = f"Dense start: loss of loop {loop} (nats/token) after some steps"
    return Table(title=title, columns=("", *map(str, steps)), rows=rows)


def _at(course: Course, step: int, loop: int) -> str:
    """Returns the loss of a loop at a step, or nothing if it was not measured."""
    loss = dict(zip(course.steps, course.after_loop(loop), strict=True)).get(step)
    return "" if loss is None else f"{loss:.3f}"


def _returns(courses: Sequence[Course], dense_loss: float, loops: int) -> Table:
    """Returns the table of steps until the dense loss is recovered."""
    rows = []
    for course in courses:
        found = [course.back(dense_loss, loop) for loop in (1, loops)]
        rows.append([course.name, *(f"not in {course.steps[-1]}" if step is None else str(step) for step in found)])
    title = "Dense start: steps until the loss is back at the dense model's, and stays"
    return Table(title=title, columns=("", "loop 1", f"loop {loops}"), rows=rows)


def _plot(courses: Sequence[Course], dense_loss: float, loops: int, path: Path) -> None:
    """Plots the losses of the first and the last loop by steps, and marks the dense model's."""
    made, grid = figure(columns=2)
    for axes, loop in zip(grid, (1, loops), strict=True):
        for course in courses:
            axes.plot(course.steps, course.after_loop(loop), linewidth=1.4, label=course.name)
        axes.axhline(dense_loss, color="#777777", linestyle="--", linewidth=1.0)
        axes.set(title=f"loop {loop}", xlabel="training steps", ylim=(dense_loss - 0.2, dense_loss + 1.5))

    grid[0].set_ylabel("held-out loss (nats/token)")
    grid[0].legend(frameon=False, fontsize=8)
    save_figure(made, path)


DENSE_START = DenseStart()
