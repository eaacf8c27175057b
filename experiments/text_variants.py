"""Grids of variants of one text model: all train alike, and differ in a few fields of their recipe.

The experiments on optimizers, stabilizers, test-time depth and equilibria share these grids, their runs and what is
measured in every run. Seeds are the outermost loop of a grid, so that a part of it already compares all variants.

The guard that skips spikes is off: it would hide what is measured. Steps whose gradient is not finite are skipped and
counted, and never end a run. The learning rate is constant after its warm-up, so that losses in the middle of a run are
as good as those at its end, and variants can be compared at equal time too.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from rich.console import Console

from experiments.frame import Cell, Record
from experiments.text_models import SMALLEST, TextModel, TextModels, trained
from looplm_jax.data import ValidationBatches
from looplm_jax.evaluation import evaluate_held_out
from looplm_jax.loading import Loaded, load
from looplm_jax.models import count_params
from looplm_jax.training._goodput import train_flops_per_token
from looplm_jax.training._metrics import EVALUATION, TRAIN, read_metrics

# Grids


Changes = Mapping[str, Any]
"""New values of recipe fields, by their dotted paths."""

ALIKE: Changes = MappingProxyType(
    {
        "stages.pretrain.schedule": "constant",
        "stages.pretrain.decay_steps": 0,
        "stages.pretrain.final_learning_rate": 0.0,
        "guard.sigma": 1e6,
        "guard.patience": 10**9,
        "mesh.data": 1,
        "log_every": 1,
    }
)  # what all runs of all grids have in common

TINY: Changes = MappingProxyType({**SMALLEST, **ALIKE, "stages.pretrain.steps": 6, "evaluation.every": 3})

SMALL: Changes = MappingProxyType(
    {
        **ALIKE,
        "model.vocab_size": 512,
        "model.width": 64,
        "model.mlp_width": 176,
        "compute.remat": "none",
        "stages.pretrain.batch_size": 8,
        "stages.pretrain.sequence_length": 64,
        "stages.pretrain.warmup_steps": 20,
        "evaluation.sequences": 64,
    }
)  # changes of `demo` to one layer of width 64, and steps of 8 x 64 tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariantGrid:
    """The runs of a scale: every variant, learning rate, number of loops and seed.

    Args:
      recipe: the name of a recipe.
      changes: changes of the recipe in all runs.
      variants: the changes of each variant, by its name, as functions of the number of loops.
      loops: the numbers of loops, those that matter most first.
      rates: the learning rates, those that matter most first.
      seeds: the number of seeds.
      held_out: the arguments of `TextModels.held_out`.
      documents: text files; if empty, the source of the standard library.
    """

    recipe: str
    changes: Changes
    variants: Mapping[str, Callable[[int], Changes]]
    loops: Sequence[int]
    rates: Sequence[float]
    seeds: int
    held_out: Mapping[str, int]
    documents: str = ""

    def cells(self) -> tuple[Cell, ...]:
        """Returns one cell per run; the variants are the innermost loop, the seeds the outermost."""
        return tuple(
            Cell(
                name=f"{file_name(variant)}-T{loops}-lr{rate:g}-seed{seed}",
                settings={
                    "variant": variant,
                    "loops": loops,
                    "rate": rate,
                    "model": dataclasses.asdict(self._model(variant, loops, rate, seed)),
                    "held_out": dict(self.held_out),
                },
            )
            for seed, loops, rate, variant in itertools.product(
                range(self.seeds), self.loops, self.rates, self.variants
            )
        )

    def _model(self, variant: str, loops: int, rate: float, seed: int) -> TextModel:
        """Returns the model of a run."""
        changes = {
            **self.changes,
            "model.loops": loops,
            "stages.pretrain.loops": loops,
            "stages.pretrain.learning_rate": rate,
            **self.variants[variant](loops),
        }
        return TextModel(recipe=self.recipe, changes=changes, seed=seed, documents=self.documents)


def file_name(variant: str) -> str:
    """Returns the name of a variant without characters that file names should not have."""
    return re.sub(r"[^a-zA-Z0-9.=+]+", "-", variant)


def always(changes: Changes) -> Callable[[int], Changes]:
    """Returns changes that do not depend on the number of loops, as `VariantGrid` takes them."""
    return lambda loops: changes


# Runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A trained variant, its held-out text, and the figures that all experiments report."""

    loaded: Loaded
    held_out: ValidationBatches
    figures: Mapping[str, Any]


def train_variant(cell: Cell, folder: Path, experiment: str, console: Console) -> Run:
    """Trains the variant of a cell, or resumes its training.

    Raises:
      Stopped: a signal arrived; calling again resumes.
    """
    models, model = TextModels.beside(folder, experiment, console), TextModel(**cell.settings["model"])
    run = trained(models.stage1_recipe(model), folder / "run", console, evaluate=evaluate_held_out)
    loaded = load(run)
    (stage,) = loaded.recipe.stages

    about = {name: cell.settings[name] for name in ("variant", "loops", "rate")}
    size = {
        "seed": model.seed,
        "steps": stage.steps,
        "tokens_per_step": stage.batch_size * stage.sequence_length,
        "parameters": count_params(loaded.recipe.model),
        "flops_per_token": train_flops_per_token(
            loaded.recipe.model,
            loops=stage.mean_loops,
            sequence_length=stage.sequence_length,
            objective=stage.objective,
            read_out=stage.read_out,
            backprop_loops=stage.backward_loops,
        ),
    }
    return Run(
        loaded=loaded,
        held_out=models.held_out(model, loaded, **cell.settings["held_out"]),
        figures={**about, **size, **training_figures(read_metrics(run))},
    )


_TAIL = 0.1  # the fraction of steps, at the end, over which the training loss is averaged
_POINTS = 20  # of a stored curve
_SPIKE = 0.5  # nats above the mean of the last losses
_RECENT = 20  # steps


def training_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns how a run went, from its metrics, of which every step is logged.

    Returns:
      training_loss: its mean over the last tenth of the steps; curve: step and mean loss of up to 20 equal parts;
        held_out_curve: step and held-out loss at the trained depth, for every evaluation during training; spikes: the
        number of losses more than 0.5 nats above the mean of the 20 before; skipped: the number of steps whose loss or
        gradient was not finite; gradient_norm: its median, 99 % quantile and maximum before clipping;
        seconds_per_step: the median; solver_loops: the mean number of loops to a fixed point, or None.
    """
    steps = [row for row in rows if row["kind"] == TRAIN]
    losses, norms = (np.array([row[name] for row in steps], float) for name in ("loss", "gradient_norm"))
    seconds = [row["tokens"] / row["tokens_per_second"] for row in steps]
    last = losses[-max(round(_TAIL * len(losses)), 1) :]

    return {
        "training_loss": float(last.mean()),
        "curve": _averaged(losses),
        "held_out_curve": [[row["step"], row["loss_per_loop"][-1]] for row in rows if row["kind"] == EVALUATION],
        "spikes": spikes(losses),
        "skipped": steps[-1]["skipped"],
        "gradient_norm": _quantiles(norms),
        "seconds_per_step": float(np.median(seconds)),
        "solver_loops": float(np.mean([row["solver_loops"] for row in steps])) if "solver_loops" in steps[0] else None,
    }


def spikes(losses: Float[np.ndarray, "steps"]) -> int:
    """Returns the number of losses that are far above the mean of the losses before them, or not finite."""
    before = [losses[max(step - _RECENT, 0) : step] for step in range(1, len(losses))]
    return sum(not loss <= recent.mean() + _SPIKE for loss, recent in zip(losses[1:], before, strict=True))


def _averaged(losses: Float[np.ndarray, "steps"]) -> list[list[float]]:
    """Returns the last step and the mean loss of each part of a run."""
    parts = np.array_split(np.arange(len(losses)), min(_POINTS, len(losses)))
    return [[int(part[-1]) + 1, float(losses[part].mean())] for part in parts]


def _quantiles(norms: Float[np.ndarray, "steps"]) -> dict[str, float]:
    """Returns median, 99 % quantile and maximum of the norms that are finite."""
    finite = norms[np.isfinite(norms)]
    if not finite.size:
        return dict.fromkeys(("median", "high", "max"), float("nan"))
    return {"median": float(np.median(finite)), "high": float(np.quantile(finite, 0.99)), "max": float(finite.max())}


# Reporting


Results = Sequence[Mapping[str, Any]]
Score = Callable[[Mapping[str, Any]], float]


def by_variant(records: Sequence[Record]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the results of each variant, in the order of the records."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record.result["variant"], []).append(record.result)
    return found


def best_rate(results: Results, score: Score) -> tuple[float, list[Mapping[str, Any]]]:
    """Returns the learning rate with the lowest mean score over its seeds, and its results.

    A score that is not finite counts as infinite.
    """
    by_rate: dict[float, list[Mapping[str, Any]]] = {}
    for result in results:
        by_rate.setdefault(result["rate"], []).append(result)
    best = min(by_rate, key=lambda rate: _mean_score(by_rate[rate], score))
    return best, by_rate[best]


def _mean_score(results: Results, score: Score) -> float:
    """Returns the mean score, infinite if it is not finite."""
    mean = float(np.mean([score(result) for result in results]))
    return mean if np.isfinite(mean) else float("inf")


def mean_range(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean of values, with their range if there are several."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def held_out_at(result: Mapping[str, Any], step: float) -> float:
    """Returns the held-out loss at a step, linear between evaluations; NaN before the first and after the last."""
    steps, losses = np.array(result["held_out_curve"], float).T
    return float(np.interp(step, steps, losses, left=np.nan, right=np.nan))
