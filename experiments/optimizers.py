"""Optimizers: Muon and Adafactor against AdamW on the text of the demonstration, at equal steps and at equal time.

    python -m experiments optimizers --scale cpu

The model is that of `demo`, with its loss (Eq. 4). Muon updates the matrices of the shared stack by a momentum whose
singular values are made equal (Newton-Schulz), scaled like AdamW's updates; embedding, head, norms and gate are
AdamW's. Adafactor keeps row and column means of squared gradients, and its rate is relative to the size of each
parameter, so its best rate need not be near the others'. All have the same list of rates, warm-up, weight decay and
gradient clip.

Reported at each optimizer's best rate: held-out loss after the same number of steps, and at the step that the
optimizer has reached when AdamW, at the median time of a step, ends. Nothing is published for a looped model of this
size; Muon's published gain over AdamW for language models is about half of the compute (Jordan et al., 2024; arXiv
2502.16982).

`cpu`: 300 steps of 512 tokens. `gpu` and `paper` (not run): `text-small`, and the size of the paper's first stage.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.text_variants import (
    ALIKE,
    TINY,
    Results,
    Score,
    VariantGrid,
    always,
    best_rate,
    by_variant,
    held_out_at,
    mean_range,
    train_variant,
)
from looplm_jax.evaluation import Table, figure, save_figure

_BASELINE = "adamw"
_KINDS = {kind: always({"optimizer.kind": kind}) for kind in (_BASELINE, "muon", "adafactor")}
# The fields of AdamW that another optimizer does not read stay at their defaults, as `demo` has them.

GRIDS: Mapping[Scale, VariantGrid] = MappingProxyType(
    {
        Scale.SMOKE: VariantGrid(
            recipe="demo",
            changes=TINY,
            variants=_KINDS,
            loops=(2,),
            rates=(3e-3,),
            seeds=1,
            held_out={"sequences": 8, "sequence_length": 64, "batch_size": 4},
        ),
        Scale.CPU: VariantGrid(
            recipe="demo",
            changes={
                **ALIKE,
                "compute.remat": "none",
                "stages.pretrain.steps": 300,
                "evaluation.every": 50,
                "evaluation.sequences": 64,
            },
            variants=_KINDS,
            loops=(4,),
            rates=(3e-3, 1e-3, 1e-2, 3e-2),
            seeds=3,
            held_out={"sequences": 64, "sequence_length": 128, "batch_size": 8},
        ),
        Scale.GPU: VariantGrid(
            recipe="text-small",
            changes={
                **ALIKE,
                "stages.pretrain.batch_size": 32,
                "stages.pretrain.steps": 2000,
                "evaluation.every": 200,
                "data.validation_fraction": 0.05,
            },
            variants=_KINDS,
            loops=(4,),
            rates=(1e-3, 3e-3, 3e-4, 1e-2),
            seeds=3,
            held_out={"sequences": 1024, "sequence_length": 256, "batch_size": 32},
        ),
        Scale.PAPER: VariantGrid(
            recipe="text-small",
            changes={
                **ALIKE,
                "model.vocab_size": 49152,
                "model.width": 2048,
                "model.mlp_width": 5632,
                "model.num_layers": 24,
                "model.num_heads": 16,
                "stages.pretrain.batch_size": 24,
                "stages.pretrain.sequence_length": 2048,
                "stages.pretrain.steps": 40_000,
                "stages.pretrain.warmup_steps": 1000,
                "evaluation.every": 2000,
                "data.validation_fraction": 0.001,
            },
            variants=_KINDS,
            loops=(4,),
            rates=(3e-4, 1e-3, 1e-4),
            seeds=3,
            held_out={"sequences": 2048, "sequence_length": 2048, "batch_size": 8},
            documents="corpora/fineweb-edu/*.jsonl",
        ),
    }
)


class Optimizers:
    """The experiment on optimizers."""

    name = "optimizers"
    claim = "Muon needs fewer steps and less time than AdamW, and Adafactor does not"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per optimizer, learning rate and seed."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains the model, with evaluations along the way."""
        return train_variant(cell, folder, self.name, console).figures

    def report(self, records: Sequence[Record]) -> Report:
        """Returns the comparison at the best rates, the sweep of rates, and the curves."""
        found = by_variant(records)
        best = {variant: best_rate(results, final_loss) for variant, results in found.items()}
        return Report(
            tables=[_best_table(best), rate_table(found, final_loss, "Held-out loss (nats/token) by learning rate")],
            findings=_findings(best),
            figures={"optimizers.png": functools.partial(_plot, found, best)},
        )


def final_loss(result: Mapping[str, Any]) -> float:
    """Returns the held-out loss after the last step."""
    return float(result["held_out_curve"][-1][1])


def rate_table(found: Mapping[str, Results], score: Score, title: str) -> Table:
    """Returns the mean score of every variant at every learning rate, over the seeds that were run."""
    rates = sorted({result["rate"] for results in found.values() for result in results})
    rows = []
    for variant, results in found.items():
        of_rates = [[score(result) for result in results if result["rate"] == rate] for rate in rates]
        rows.append([variant, *(mean_range(scores) if scores else "" for scores in of_rates)])
    return Table(title=title, columns=["", *(f"{rate:g}" for rate in rates)], rows=rows)


_Best = Mapping[str, tuple[float, Results]]


def at_equal_time(result: Mapping[str, Any], seconds: float) -> float:
    """Returns the held-out loss of a run after some seconds of steps; that of its end if it ends before."""
    return held_out_at(result, min(seconds / result["seconds_per_step"], result["steps"]))


def run_seconds(results: Results) -> float:
    """Returns the time of all steps of a run, the median over seeds."""
    return float(np.median([result["steps"] * result["seconds_per_step"] for result in results]))


def _best_table(best: _Best) -> Table:
    """Returns one row per optimizer at its best learning rate."""
    time = run_seconds(best[_BASELINE][1]) if _BASELINE in best else np.nan
    rows = [
        [
            variant,
            f"{rate:g}",
            str(len(results)),
            mean_range([final_loss(result) for result in results]),
            mean_range([at_equal_time(result, time) for result in results]),
            f"{1000 * np.median([result['seconds_per_step'] for result in results]):.0f}",
            str(sum(result["spikes"] for result in results)),
            f"{results[0]['parameters']:,}",
        ]
        for variant, (rate, results) in best.items()
    ]
    columns = ("optimizer", "best rate", "seeds", "loss, equal steps", "loss, equal time", "ms a step", "spikes")
    return Table(
        title=f"Held-out loss (nats/token) after {next(iter(best.values()))[1][0]['steps']} steps, or AdamW's time",
        columns=[*columns, "parameters"],
        rows=rows,
        marked=list(best).index(_BASELINE) if _BASELINE in best else None,
    )


def _findings(best: _Best) -> list[str]:
    """Returns the difference of each optimizer from AdamW, seed by seed."""
    if _BASELINE not in best:
        return []
    base, time = best[_BASELINE][1], run_seconds(best[_BASELINE][1])
    found = []
    for variant, (_, results) in best.items():
        pairs = [(own, other) for own in results for other in base if own["seed"] == other["seed"]]
        if variant != _BASELINE and pairs:
            steps = ", ".join(f"{final_loss(own) - final_loss(other):+.3f}" for own, other in pairs)
            timed = ", ".join(f"{at_equal_time(own, time) - final_loss(other):+.3f}" for own, other in pairs)
            found.append(
                f"{variant} against {_BASELINE}, each at its best rate, seed by seed (nats/token): {steps} at equal "
                f"steps; {timed} at equal time."
            )
    return found


def _plot(found: Mapping[str, Results], best: _Best, path: Path) -> None:
    """Plots held-out loss by step at the best rate, one line per seed; and final loss by rate, means over seeds."""
    made, (left, right) = figure(columns=2)
    for number, (variant, results) in enumerate(found.items()):
        color = f"C{number}"
        for index, result in enumerate(best[variant][1]):
            steps, losses = zip(*result["held_out_curve"], strict=True)
            left.plot(steps, losses, color=color, label=f"{variant}, {best[variant][0]:g}" if not index else None)
        plot_rates(right, results, final_loss, color, variant)

    left.set(xlabel="step", ylabel="held-out loss (nats/token)")
    left.legend(frameon=False)
    right.set(xlabel="learning rate", ylabel="held-out loss at the end (nats/token)", xscale="log")
    right.legend(frameon=False)
    save_figure(made, path)


def plot_rates(axes: Any, results: Results, score: Score, color: str, label: str, style: str = "o-") -> None:
    """Plots the mean score over seeds by learning rate."""
    rates = sorted({result["rate"] for result in results})
    means = [np.mean([score(result) for result in results if result["rate"] == rate]) for rate in rates]
    axes.plot(rates, means, style, color=color, label=label)


OPTIMIZERS = Optimizers()
