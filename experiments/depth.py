"""Depth and extrapolation (paper, Tables 10 to 13): quality at every number of loops, up to twice the trained number.

    python -m experiments depth --scale cpu

A looped model runs at any depth. Published: Ouro's base models are best at the four loops that they were trained with,
much worse below and slightly worse beyond (MMLU at T = 1..8, in the table); the Thinking models peak at T = 3 to 5.

For any trained model, one command gives this sweep: `looplm evaluate RUN` measures every depth up to twice the trained
one, `--max-loops T` up to any other, and `--tasks mmlu --num-fewshot 5 --depth-sweep` the published benchmark. This
experiment is a grid over seeds, next to the published rows: loss and next-token accuracy of the text models that
early-exit and kv-sharing also study. Exact match at every depth, where one loop too few gives a wrong answer, is part
of every cell of mano, addition, p-hop and the other grids over shapes: see their figures `depths_TEST.png`.

`cpu`: two seeds; takes seconds in addition to the training of the text models. `gpu` (not run): `text-small`. `paper`
(not run): the published Ouro-1.4B, in `checkpoints/ouro-1.4b`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.frame import Cell, Record, Report
from experiments.text_models import OnTextModels
from looplm_jax.evaluation import Curve, DepthSweep, Table, depth_sweep, plot_depths
from looplm_jax.loading import load

# MMLU of the base models at 1..8 loops.
_PRINTED = {
    "Ouro-1.4B": (41.21, 60.43, 66.71, 67.45, 66.64, 65.77, 65.28, 64.49),
    "Ouro-2.6B": (51.55, 67.63, 73.57, 74.60, 74.43, 73.79, 72.92, 72.24),
}


class Depth(OnTextModels):
    """The depth experiment."""

    name = "depth"
    claim = "a looped model runs at any depth: quality at T = 1 to twice the trained number of loops"

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains Stage I, unless it is trained, and measures all depths."""
        models, model, held_out = self.studied(cell, folder, console)
        loaded = load(models.stage1(model))
        return depth_sweep(loaded.model, loaded.params, models.held_out(model, loaded, **held_out)).to_json()

    def report(self, records: Sequence[Record]) -> Report:
        """Reports the text models by loops, next to the published benchmark."""
        sweeps = {record.cell.removeprefix("text-"): _sweep(record.result) for record in records}
        results = [record.result for record in records]
        return Report(
            tables=[_table(results)],
            findings=[_finding(results)],
            figures={"depths.png": functools.partial(plot_depths, sweeps)},
        )


def _sweep(result: Mapping[str, Any]) -> DepthSweep:
    """Returns the sweep of a stored result."""
    curve = Curve.of(*(result[name] for name in ("loops", "loss", "accuracy")))
    return DepthSweep(curve=curve, trained_loops=result["trained_loops"], tokens=result["tokens"])


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a table with one row per depth: mean and range over seeds, and the published accuracies."""
    trained = results[0]["trained_loops"]
    columns = [
        "loops",
        "loss (nats/token)",
        "range",
        "accuracy",
        "range",
        *(f"printed MMLU, {name}" for name in _PRINTED),
    ]

    # [seeds, loops]
    loss, accuracy = (np.array([result[name] for result in results]) for name in ("loss", "accuracy"))
    rows = [
        [
            f"{loops:g}",
            f"{loss[:, index].mean():.4f}",
            f"{loss[:, index].min():.4f} to {loss[:, index].max():.4f}",
            f"{accuracy[:, index].mean():.2%}",
            f"{accuracy[:, index].min():.2%} to {accuracy[:, index].max():.2%}",
            *(f"{printed[index]:.2f}" if index < len(printed) else "" for printed in _PRINTED.values()),
        ]
        for index, loops in enumerate(results[0]["loops"])
    ]

    title = f"Every depth, held-out text, mean of {len(results)} seeds (trained with {trained} loops)"
    return Table(title=title, columns=columns, rows=rows, marked=trained - 1)


def _finding(results: Sequence[Mapping[str, Any]]) -> str:
    """Returns a sentence about the best depth."""
    loss = np.mean([result["loss"] for result in results], axis=0)
    trained, best = results[0]["trained_loops"], int(np.argmin(loss)) + 1
    return (
        f"The least loss is at {best} loops, trained with {trained}: {loss[best - 1]:.4f} nats a token against "
        f"{loss[0]:.4f} at one loop, {loss[trained - 1]:.4f} at the trained depth and {loss[-1]:.4f} at {len(loss)}. "
        "Printed: best at 4 loops, trained with 4; 3.0 (1.4B) and 2.4 (2.6B) points of MMLU less at 8."
    )


DEPTH = Depth()
