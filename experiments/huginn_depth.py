"""Test-time depth: random depth and truncated gradients against a fixed depth (Huginn, arXiv 2502.05171).

    python -m experiments huginn-depth --scale cpu

Huginn draws the number of loops of every step from a Poisson distribution with a log-normal rate, back-propagates
through the last k = 8 only, and can then be called with any number of loops. Models with its block (norms of the sum,
an adapter, a prelude and a coda) are trained with a drawn depth of mean 8 and k = all, 8 and 4, and with 8 loops
always; each is evaluated at r = 1, 2, 4, ..., 64. Gradients through fewer loops cost less, so FLOP are reported
beside the loss.

Published for Huginn-0125 (mean 32, k = 8), accuracy by r = 4, 8, 16, 32: in the table. Two sources find that
truncation trains the loop worse (2604.21106, 2604.12946).

`cpu`: 1-1-1 layers (prelude, core, coda) of width 64, 240 steps of 8 x 64 tokens. `gpu` (not run): 2-2-1 layers of
width 128. `paper` (not run): 2-4-2 layers of width 1024 and mean 32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.stabilizers import HUGINN, random_depth
from experiments.text_variants import (
    ALIKE,
    SMALL,
    TINY,
    Changes,
    Results,
    VariantGrid,
    always,
    best_rate,
    by_variant,
    mean_range,
    train_variant,
)
from looplm_jax.evaluation import Table, depth_sweep, figure, save_figure

# Huginn-0125 by the number of loops.
_PRINTED = {
    "ARC-E": {4: 49.07, 8: 65.11, 16: 69.49, 32: 69.91},
    "HellaSwag": {4: 43.46, 8: 58.54, 16: 64.67, 32: 65.21},
    "MMLU": {4: 23.39, 8: 25.29, 16: 31.25, 32: 31.38},
}
_FIXED = "fixed"


def _variants(truncations: Sequence[int]) -> Mapping[str, Callable[[int], Changes]]:
    """Returns a fixed depth, and drawn depths with gradients through all or the last few loops."""
    drawn = {f"random, k={loops or 'all'}": random_depth(loops) for loops in (0, *truncations)}
    return {_FIXED: always({**HUGINN, "stages.pretrain.read_out": "last"}), **drawn}


def _layers(prelude: int, core: int, coda: int) -> Changes:
    """Returns the layers of a model, and the loss of its last loop."""
    return {
        "model.prelude_layers": prelude,
        "model.num_layers": core,
        "model.coda_layers": coda,
        "stages.pretrain.objective": "last_loss",
    }


GRIDS: Mapping[Scale, VariantGrid] = MappingProxyType(
    {
        Scale.SMOKE: VariantGrid(
            recipe="demo",
            changes={**TINY, **_layers(1, 1, 1)},
            variants=_variants((2,)),
            loops=(3,),
            rates=(3e-3,),
            seeds=1,
            held_out={"sequences": 8, "sequence_length": 64, "batch_size": 8},
        ),
        Scale.CPU: VariantGrid(
            recipe="demo",
            changes={**SMALL, **_layers(1, 1, 1), "stages.pretrain.steps": 240},
            variants=_variants((8, 4)),
            loops=(8,),
            rates=(3e-3, 1e-2),
            seeds=3,
            held_out={"sequences": 64, "sequence_length": 64, "batch_size": 8},
        ),
        Scale.GPU: VariantGrid(
            recipe="demo",
            changes={
                **ALIKE,
                **_layers(2, 2, 1),
                "model.width": 128,
                "model.mlp_width": 352,
                "stages.pretrain.batch_size": 32,
                "stages.pretrain.steps": 3000,
                "stages.pretrain.warmup_steps": 100,
            },
            variants=_variants((8, 4)),
            loops=(8,),
            rates=(1e-3, 3e-3),
            seeds=3,
            held_out={"sequences": 256, "sequence_length": 128, "batch_size": 8},
        ),
        Scale.PAPER: VariantGrid(
            recipe="text-small",
            changes={
                **ALIKE,
                **_layers(2, 4, 2),
                "model.width": 1024,
                "model.mlp_width": 3520,
                "model.num_heads": 16,
                "stages.pretrain.batch_size": 128,
                "stages.pretrain.steps": 20_000,
                "stages.pretrain.warmup_steps": 1000,
                "data.validation_fraction": 0.001,
            },
            variants=_variants((8, 4)),
            loops=(32,),
            rates=(3e-4, 1e-3),
            seeds=3,
            held_out={"sequences": 1024, "sequence_length": 256, "batch_size": 8},
            documents="corpora/fineweb-edu/*.jsonl",
        ),
    }
)


class HuginnDepth:
    """The experiment on test-time depth."""

    name = "huginn-depth"
    claim = "a model trained with random depth keeps its quality at any deeper call, one of fixed depth does not"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per variant, learning rate and seed."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains a model, and evaluates it at depths up to eight times its own, in powers of two."""
        run, loops = train_variant(cell, folder, self.name, console), cell.settings["loops"]
        sweep = depth_sweep(run.loaded.model, run.loaded.params, run.held_out, max_loops=8 * loops).curve
        depths = [2**power for power in range(8 * loops) if 2**power <= 8 * loops]
        return {**run.figures, "depths": depths, "held_out": [sweep.loss[depth - 1] for depth in depths]}

    def report(self, records: Sequence[Record]) -> Report:
        """Returns the loss by depth of every variant at its best rate, beside the published accuracies."""
        best = {variant: best_rate(results, _near_mean) for variant, results in by_variant(records).items()}
        return Report(
            tables=[_table(best), _printed_table()],
            findings=[_finding(variant, results) for variant, (_, results) in best.items()],
            figures={"depths.png": functools.partial(_plot, best)},
        )


def _near_mean(result: Mapping[str, Any]) -> float:
    """Returns the held-out loss at the deepest measured depth that is not above the mean of training."""
    index = max(number for number, depth in enumerate(result["depths"]) if depth <= result["loops"])
    return float(result["held_out"][index])


_Best = Mapping[str, tuple[float, Results]]


def _table(best: _Best) -> Table:
    """Returns one row per variant: loss by depth."""
    (_, first), *_ = best.values()
    rows = [
        [
            variant,
            f"{rate:g}",
            str(len(results)),
            *(
                mean_range([result["held_out"][number] for result in results])
                for number, _ in enumerate(first[0]["depths"])
            ),
            str(sum(result["spikes"] for result in results)),
            f"{1000 * np.median([result['seconds_per_step'] for result in results]):.0f}",
            f"{results[0]['flops_per_token'] / 1e6:.2f}",
        ]
        for variant, (rate, results) in best.items()
    ]
    depths = [f"r = {depth}" for depth in first[0]["depths"]]
    return Table(
        title=f"Held-out loss (nats/token) by loops of the call, trained with {first[0]['loops']} or that mean",
        columns=["depth in training", "best rate", "seeds", *depths, "spikes", "ms a step", "MFLOP a token"],
        rows=rows,
    )


def _printed_table() -> Table:
    """Returns the published accuracies."""
    columns = ["benchmark", *(f"r = {depth}" for depth in _PRINTED["MMLU"])]
    rows = [[name, *(f"{value:.2f}" for value in values.values())] for name, values in _PRINTED.items()]
    return Table(
        title="Printed: Huginn-0125, trained with a mean of 32 loops and k = 8, accuracy (%)",
        columns=columns,
        rows=rows,
    )


def _finding(variant: str, results: Results) -> str:
    """Returns the best depth of a variant, and what is lost at the deepest."""
    depths, losses = results[0]["depths"], np.mean([result["held_out"] for result in results], axis=0)
    best = int(np.argmin(losses))
    return (
        f"{variant}: best at r = {depths[best]} ({losses[best]:.3f} nats/token); {losses[-1] - losses[best]:+.3f} at "
        f"r = {depths[-1]}, mean of {len(results)} seeds."
    )


def _plot(best: _Best, path: Path) -> None:
    """Plots held-out loss by depth of the call: mean over seeds, and their range."""
    made, (axes,) = figure(width=7.0)
    for number, (variant, (_, results)) in enumerate(best.items()):
        losses, depths = np.array([result["held_out"] for result in results]), results[0]["depths"]
        axes.plot(depths, losses.mean(0), color=f"C{number}", marker="o", label=variant)
        axes.fill_between(depths, losses.min(0), losses.max(0), color=f"C{number}", alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(depth) for depth in depths])

    axes.set(xlabel="loops of the call", ylabel="held-out loss (nats/token)")
    axes.legend(frameon=False)
    save_figure(made, path)


HUGINN_DEPTH = HuginnDepth()
