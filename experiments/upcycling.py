"""Upcycling: which order of the copied layers keeps the loss closer to the base, and which trains better from there.

    python -m experiments upcycling --scale cpu

Ouro-2.6B starts from the 24 layers of Ouro-1.4B, twice (paper, section 4.1), in an order that is not published. Here a
small looped model is trained on the source of the local Python's standard library, upcycled to twice its layers in
either order, and trained further, with the optimizer state and with a fresh one. The base itself is trained further for
comparison. All of them see the same data, in an order that is new to them, at a third of the previous learning rate.

A cell is one of these models with one seed. The cells share the folder `shared`, which holds a base per seed; the first
cell that needs a base trains it. `docs/upcycling.md` has the results at `cpu`, whose records have neither times nor
versions: they were converted from an earlier format.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.text_models import TextModels, alone, train_and_evaluate, trained
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ModelConfig,
    Recipe,
    Schedule,
    SourceConfig,
    Stage,
    StartConfig,
)
from looplm_jax.convert import Order, upcycle
from looplm_jax.data import ValidationBatches
from looplm_jax.evaluation import Table, exit_curve, figure, save_figure
from looplm_jax.models import LoopLM, Params

_BATCH_SIZE = 4
_NEW_ORDER = 1000  # added to the seed of later training, which reads the data in another order than the base
_FRESH = "-fresh-optimizer"
_COLORS = {"base": "#3a3a3a", "interleave": "#1f5fa8", "stack": "#d1495b"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A model that is trained further.

    Attributes:
      order: the order of its copied layers; empty: it is the base itself.
      optimizer: whether training continues with the state of the optimizer.
    """

    order: str
    optimizer: bool

    @property
    def name(self) -> str:
        """Returns the name in the results."""
        return (self.order or "base") + ("" if self.optimizer else _FRESH)


VARIANTS = tuple(
    Variant(order=order, optimizer=optimizer)
    for optimizer in (True, False)
    for order in ("", *(order.value for order in Order))
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcyclingRun:
    """The settings of a cell: a variant, the base and its training, the steps after upcycling, and the measurements."""

    model: ModelConfig
    base_steps: int
    warmup_steps: int
    base_learning_rate: float
    steps: int
    learning_rate: float
    measured_every: int
    sequences: int
    sequence_length: int
    seed: int = 0
    variant: Variant = VARIANTS[0]

    @property
    def deep_model(self) -> ModelConfig:
        """Returns the shape of the variant."""
        copies = 2 if self.variant.order else 1
        return dataclasses.replace(self.model, num_layers=copies * self.model.num_layers)


# The grid


_CPU = UpcyclingRun(
    model=ModelConfig(
        vocab_size=2048, width=192, mlp_width=512, num_layers=2, num_heads=4, rope_theta=1e4, max_positions=1024
    ),
    base_steps=1000,
    warmup_steps=40,
    base_learning_rate=1.5e-3,
    steps=200,
    learning_rate=5e-4,
    measured_every=50,
    sequences=256,
    sequence_length=128,
)
_SMOKE = dataclasses.replace(
    _CPU,
    model=dataclasses.replace(_CPU.model, vocab_size=384, width=32, mlp_width=48),
    base_steps=4,
    warmup_steps=0,
    steps=4,
    measured_every=2,
    sequences=4,
    sequence_length=64,
)
_RUNS: Mapping[Scale, UpcyclingRun] = MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU})
_SEEDS: Mapping[Scale, int] = MappingProxyType({Scale.SMOKE: 1, Scale.CPU: 2})


def _settings(run: UpcyclingRun) -> dict[str, Any]:
    """Returns a run as plain values, without fields of the model that have their default.

    Records therefore stay those of the grid when the configuration of models gets a new field.
    """
    settings, defaults = to_dict(run), {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    kept = {name for name, default in defaults.items() if getattr(run.model, name) != default}
    return {**settings, "model": {name: value for name, value in settings["model"].items() if name in kept}}


class Upcycling:
    """The upcycling experiment."""

    name = "upcycling"
    claim = "a stack of copied layers starts where the base ended: two orders of the copies, and the optimizer state"
    scales = tuple(_RUNS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per seed and variant."""
        runs = [
            dataclasses.replace(_RUNS[scale], seed=seed, variant=variant)
            for seed in range(_SEEDS[scale])
            for variant in VARIANTS
        ]
        return tuple(Cell(name=f"{run.variant.name}-seed{run.seed}", settings=_settings(run)) for run in runs)

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains the base, unless it is trained, upcycles it, trains it further, and returns its held-out losses."""
        work = _Work(
            run=from_dict(UpcyclingRun, cell.settings),
            documents=TextModels.beside(folder, self.name, console).stdlib(),
            # The results folder has `cells/CELL`.
            shared=folder.parent.parent / "shared",
            console=console,
        )

        rows = work.train_further(folder)
        return {
            "seed": work.run.seed,
            "variant": work.run.variant.name,
            "steps": [row["step"] for row in rows],
            "loss_per_loop": [row["loss_per_loop"] for row in rows],
            "expected_loss": [row["expected_loss"] for row in rows],
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns a table per measure, the comparison of the orders, and the figure."""
        variants = _by_variant(records)
        return Report(
            tables=_tables(variants),
            findings=[_setting(records), *_verdict(variants)],
            figures={"upcycling.png": functools.partial(_plot, variants)},
        )


# The runs of a cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    """A cell that runs: its settings, its documents, and the folder that all cells share."""

    run: UpcyclingRun
    documents: Path
    shared: Path
    console: Console

    def base(self, seed: int) -> Path:
        """Trains the base of a seed, unless it is trained. Returns its run folder."""
        run, folder = self.run, self.shared / f"base-seed{seed}"
        stage = _stage(run, run.base_steps, run.base_learning_rate, warmup_steps=run.warmup_steps)
        # All seeds share the tokenizer that the run of the first one trains.
        tokenizer = str(self.base(0) / "tokenizer.model") if seed else ""
        recipe = self._recipe(seed, stage, tokenizer=tokenizer)

        with alone(self.shared, folder.name, self.console):
            return trained(recipe, folder, self.console, evaluate=_measure)

    def train_further(self, folder: Path) -> Sequence[Mapping[str, Any]]:
        """Upcycles the base, trains the variant, and returns its evaluations."""
        run, start = self.run, self.base(self.run.seed)
        model, variant = run.deep_model, run.variant

        if variant.order:
            base, start = start, folder / "start"
            # `upcycle` writes the folder completely, or not at all.
            if not start.exists():
                deeper = upcycle(base, start, layers=model.num_layers, order=Order(variant.order))
                self.console.print(str(deeper), markup=False)

        stage = _stage(run, run.steps, run.learning_rate)
        recipe = dataclasses.replace(
            self._recipe(run.seed + _NEW_ORDER, stage, measured_every=run.measured_every),
            model=model,
            start=StartConfig(checkpoint=str(start), optimizer=variant.optimizer),
        )
        return train_and_evaluate(recipe, folder / "run", self.console, _measure)

    def _recipe(self, seed: int, stage: Stage, *, tokenizer: str = "", measured_every: int = 0) -> Recipe:
        """Returns the recipe of a run of the base model."""
        source = SourceConfig(path=str(self.documents))
        return Recipe(
            name="upcycling",
            seed=seed,
            model=self.run.model,
            stages=(stage,),
            mesh=MeshConfig(data=1),
            data=DataConfig(sources=(source,), tokenizer=tokenizer, validation_fraction=0.05, seed=seed),
            checkpoint=CheckpointConfig(every=500, keep=1),
            evaluation=EvaluationConfig(every=measured_every, sequences=self.run.sequences),
        )


def _stage(run: UpcyclingRun, steps: int, learning_rate: float, *, warmup_steps: int = 0) -> Stage:
    """Returns the only stage of a run, with a constant learning rate."""
    return Stage(
        name="pretrain",
        steps=steps,
        batch_size=_BATCH_SIZE,
        sequence_length=run.sequence_length,
        loops=run.model.loops,
        beta=0.1,
        learning_rate=learning_rate,
        schedule=Schedule.CONSTANT,
        warmup_steps=warmup_steps,
    )


def _measure(model: LoopLM, params: Params, held_out: ValidationBatches) -> dict[str, Any]:
    """Returns the loss after each loop, and the expected loss that training minimizes, in nats per token."""
    exits = exit_curve(model, params, held_out)
    return {"loss_per_loop": list(exits.fixed.loss), "expected_loss": exits.expected_loss}


# Reporting


Variants = Mapping[str, Sequence[Mapping[str, Any]]]  # the results of each variant, one per seed


def _by_variant(records: Sequence[Record]) -> Variants:
    """Returns the results by variant, in the order in which the variants first appear."""
    names = dict.fromkeys(record.result["variant"] for record in records)
    return {name: [record.result for record in records if record.result["variant"] == name] for name in names}


def _expected(results: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "R M"]:
    """Returns the expected loss over the exit distribution: one row per seed and one column per measured step."""
    return np.array([result["expected_loss"] for result in results])


def _after_loop(results: Sequence[Mapping[str, Any]], *, loop: int) -> Float[np.ndarray, "R M"]:
    """Returns the loss after a loop, counted from 1; rows and columns as in `_expected`."""
    return np.array([result["loss_per_loop"] for result in results])[..., loop - 1]


def _tables(variants: Variants) -> list[Table]:
    """Returns the tables of the expected loss and of the losses after the first and the last loop."""
    first = next(iter(variants.values()))[0]
    loops = len(first["loss_per_loop"][0])
    measures: dict[str, Callable[[Sequence[Mapping[str, Any]]], np.ndarray]] = {
        "expected loss over the exit distribution": _expected,
        "loss after loop 1": functools.partial(_after_loop, loop=1),
        f"loss after loop {loops}": functools.partial(_after_loop, loop=loops),
    }

    return [
        Table(
            title=f"Upcycling: {title} (nats/token)",
            columns=("step", *map(str, first["steps"]), "seeds"),
            rows=[
                [name, *(f"{loss:.3f}" for loss in measure(results).mean(axis=0)), str(len(results))]
                for name, results in variants.items()
            ],
        )
        for title, measure in measures.items()
    ]


def _setting(records: Sequence[Record]) -> str:
    """Returns the description of the settings."""
    run = from_dict(UpcyclingRun, records[0].settings)
    layers, model = run.model.num_layers, run.model
    return (
        f"Base: {layers} layers of width {model.width}, {model.loops} loops, {run.base_steps} steps of {_BATCH_SIZE} x "
        f"{run.sequence_length} tokens at a constant learning rate of {run.base_learning_rate:g}; upcycled: "
        f"{2 * layers} layers, trained at {run.learning_rate:g}. Losses on {run.sequences} held-out sequences, mean "
        "over seeds; at step 0, just after upcycling."
    )


def _verdict(variants: Variants) -> list[str]:
    """Returns the comparison of the two orders in one sentence, or nothing if no seed has both."""
    interleave, stack = (
        {result["seed"]: result for result in variants.get(order.value, ())}
        for order in (Order.INTERLEAVE, Order.STACK)
    )
    seeds = sorted(interleave.keys() & stack.keys())
    if not seeds:
        return []

    # [seeds, steps]
    gap = _expected([interleave[seed] for seed in seeds]) - _expected([stack[seed] for seed in seeds])
    start, end = (", ".join(f"{value:+.3f}" for value in gap[:, column]) for column in (0, -1))
    steps = interleave[seeds[0]]["steps"][-1]
    return [
        f"Expected loss, interleave minus stack, seed by seed: {start} just after upcycling; {end} after {steps} steps "
        "with the state of the optimizer."
    ]


def _plot(variants: Variants, path: Path) -> None:
    """Plots the expected loss by steps: the mean of each variant, and a band that spans its seeds."""
    made, (axes,) = figure(width=6.4)
    for name, results in variants.items():
        losses, steps = _expected(results), results[0]["steps"]
        color, style = _COLORS[name.removesuffix(_FRESH)], "--" if name.endswith(_FRESH) else "-"
        axes.plot(steps, losses.mean(axis=0), color=color, linestyle=style, marker="o", label=name)
        axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.12, linewidth=0)

    axes.set(xlabel="steps after upcycling", ylabel="expected loss (nats/token)")
    axes.set_title("Upcycling, held-out text; bands span the seeds")
    axes.legend(frameon=False)
    save_figure(made, path)


UPCYCLING = Upcycling()
