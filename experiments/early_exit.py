"""Early exit (paper, Figure 5; section 5): which exit rule gives the best quality for the fewest loops.

    python -m experiments early-exit --scale cpu

Compares every policy of `looplm_jax.halting`, with its parameter swept over its whole range, on held-out text: fixed
depth; Q-exit on the gate after Stage I, after Stage II (Eq. 5 and 6 as published), and after the look-ahead variant of
Stage II (the gate of loop t learns the gain of loop t + 1); state difference, absolute and relative; KL and entropy
change of successive predictions; unchanged arg-max; and plain confidence readouts: the largest probability, and its
margin. Stage II changes only the gate, so every rule that reads states and predictions is the same before and after it.

A family is a curve of loss (nats per token) and next-token accuracy against mean loops. All curves are extended by
straight lines to one loop and to T loops for every token, which corresponds to choosing at random between two rules,
and are compared by their area: the mean over all budgets from 1 to T. Intervals are paired 95 % percentile bootstraps
over held-out sequences.

Published (MMLU): a Stage II gate is 2 to 3 points above the Stage I gate at equal mean loops, and the state difference
is within 1 to 2 points of it. arXiv 2607.20519: plain confidence readouts often match or beat gates.

Not published, and so our choices: the thresholds, the length and learning rate of Stage II, and what is measured where
MMLU is out of reach. `cpu`: the recipe `demo`, two seeds, whose models kv-sharing and depth use as well; training takes
most of the time. `gpu` (not run): the recipe `text-small`. `paper` (not run): the published Ouro-1.4B, in the folder
`checkpoints/ouro-1.4b`; its gate is used as the Stage I gate, and Stage II is trained again, on the same text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.exit_scores import FIXED, GATE, Frontier, RowSums, families, score_families
from experiments.frame import Cell, Record, Report
from experiments.reporting import interval, resamples, run_speed, union
from experiments.text_models import OnTextModels
from looplm_jax.config import GateTarget
from looplm_jax.evaluation import Curve, Table, plot_exits
from looplm_jax.loading import load

STAGE1, PRINTED, AHEAD = f"{GATE}, Stage I gate", f"{GATE}, Stage II gate", f"{GATE}, look-ahead gate"
_TARGETS = {PRINTED: GateTarget.AS_PRINTED, AHEAD: GateTarget.LOOK_AHEAD}
_RESAMPLES = 1000
_POINT = ("loops", "loss", "accuracy")
_DRAWN = (FIXED, STAGE1, PRINTED, AHEAD, "state difference", "confidence")  # the curves in the figure
_PAIRS = (
    (PRINTED, STAGE1),
    (AHEAD, PRINTED),
    ("state difference", PRINTED),
    ("confidence", PRINTED),
    ("confidence", AHEAD),
)


class EarlyExit(OnTextModels):
    """The early-exit experiment."""

    name = "early-exit"
    claim = "the trained gate pays: quality against mean loops, for every exit policy, before and after Stage II"

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains Stage I and both kinds of Stage II, unless they are trained, and scores every policy."""
        models, model, held_out = self.studied(cell, folder, console)
        gates = {STAGE1: models.stage1(model)} | {
            name: models.stage2(model, target) for name, target in _TARGETS.items()
        }

        first = load(gates[STAGE1])
        batches = models.held_out(model, first, **held_out)
        wanted = families(first.model.config.loops)
        sums = score_families(first.model, first.params, batches, wanted)

        sums[STAGE1] = sums.pop(GATE)
        for name in _TARGETS:
            # Only the gate differs, so only the Q-exit family has to be scored again.
            params = load(gates[name]).params
            sums[name] = score_families(first.model, params, batches, {GATE: wanted[GATE]})[GATE]

        speed = {} if model.checkpoint else run_speed(gates[STAGE1])
        return {"loops": first.model.config.loops, **measure(sums), **speed}

    def report(self, records: Sequence[Record]) -> Report:
        """Returns a table of areas and budgets, the comparisons in words, and the curves."""
        results = [record.result for record in records]
        return Report(
            tables=[_table(results)],
            findings=_findings(results),
            figures={"exits.png": lambda path: plot_exits(_mean_curves(results), path)},
        )


# Measuring


def measure(sums: Mapping[str, RowSums]) -> dict[str, Any]:
    """Returns curves, areas and intervals of families that were scored on the same rows.

    Returns:
      tokens, sequences; families: by name, the points of the curve, its areas in loss and accuracy, and their
        differences
      from fixed depth; pairs: the differences of selected areas. Each difference has its interval.
    """
    rows = sums[FIXED].tokens.size
    # The first resample is the sample itself.
    drawn = np.concatenate([np.ones((1, rows), int), resamples(rows, _RESAMPLES)])

    plain = sums[FIXED].resampled(drawn)
    frontiers = {name: own.resampled(drawn).joined(plain) for name, own in sums.items()}

    return {
        "tokens": int(sums[FIXED].tokens.sum()),
        "sequences": rows,
        "families": {
            name: {"curve": _points(sums[name], drawn), **_areas(own, frontiers[FIXED])}
            for name, own in frontiers.items()
        },
        "pairs": [
            {"pair": [name, other], **_areas(frontiers[name], frontiers[other])}
            for name, other in _PAIRS
            if name in frontiers and other in frontiers
        ],
    }


def _points(sums: RowSums, drawn: np.ndarray) -> dict[str, list[float]]:
    """Returns the points of a curve, without repeated loops, in rising order."""
    own = sums.resampled(drawn[:1])
    order = np.unique(own.loops[0], return_index=True)[1]
    values = {"loops": own.loops, "loss": own.loss, "accuracy": own.accuracy}
    return {name: value[0, order].tolist() for name, value in values.items()}


def _areas(own: Frontier, other: Frontier) -> dict[str, Any]:
    """Returns the areas of a curve, and their differences from another's with intervals over resamples."""
    found: dict[str, Any] = {}
    for name in ("loss", "accuracy"):
        area, base = (each.area(getattr(each, name)) for each in (own, other))
        found |= {name: float(area[0]), f"{name}_difference": float(area[0] - base[0])}
        found[f"{name}_interval"] = list(interval((area - base)[1:]))
    return found


# Reporting


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of policies, from the lowest to the highest mean loss over all budgets."""
    budgets = _budgets(results)
    names = sorted(results[0]["families"], key=lambda name: _mean(results, name, "loss"))
    columns = ["policy", "loss, all budgets", "against fixed depth", "accuracy, all budgets", "against fixed depth"]
    columns += [f"loss at {budget:g} loops" for budget in budgets]

    # Points of families lie at different mean loops; the curves are interpolated at common ones.
    curves = _mean_curves(results, names, budgets)
    rows = [
        [
            name,
            f"{_mean(results, name, 'loss'):.4f}",
            _difference(results, name, "loss"),
            f"{100 * _mean(results, name, 'accuracy'):.2f} %",
            _difference(results, name, "accuracy"),
            *(f"{loss:.4f}" for loss in curves[name].loss),
        ]
        for name in names
    ]

    return Table(
        title=f"Early exit, mean of {len(results)} seeds", columns=columns, rows=rows, marked=names.index(FIXED)
    )


def _budgets(results: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns multiples of a half between one loop and all, at most five."""
    return np.arange(1.5, results[0]["loops"], 0.5).tolist()[:5]


def _mean(results: Sequence[Mapping[str, Any]], name: str, quantity: str) -> float:
    """Returns an area of a family, averaged over seeds."""
    return float(np.mean([result["families"][name][quantity] for result in results]))


def _difference(results: Sequence[Mapping[str, Any]], name: str, quantity: str) -> str:
    """Returns the difference from fixed depth with its interval, as text."""
    if name == FIXED:
        return ""
    return _with_interval([result["families"][name] for result in results], quantity)


def _with_interval(found: Sequence[Mapping[str, Any]], quantity: str) -> str:
    """Returns the mean difference over seeds, and the union of their intervals, as text."""
    factor, digits = (100, 2) if quantity == "accuracy" else (1, 4)
    mean = factor * np.mean([each[f"{quantity}_difference"] for each in found])
    low, high = (factor * end for end in union([each[f"{quantity}_interval"] for each in found]))
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def _findings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the findings: the best family, the compared pairs, and the published result."""
    found = []
    for index, pair in enumerate(results[0]["pairs"]):
        each = [result["pairs"][index] for result in results]
        name, other = pair["pair"]
        found.append(
            f"{name} against {other}, mean over all budgets: loss {_with_interval(each, 'loss')} nats a token, "
            f"accuracy {_with_interval(each, 'accuracy')} points."
        )

    best = min(results[0]["families"], key=lambda name: _mean(results, name, "loss"))
    tokens, sequences = results[0]["tokens"], results[0]["sequences"]
    return [
        f"The least loss over all budgets: {best} ({_mean(results, best, 'loss'):.4f} nats a token).",
        *found,
        f"{tokens:,} held-out tokens in {sequences} sequences; 95 % intervals over sequences, their union over seeds.",
        "Printed: the Stage II gate 2 to 3 points of MMLU above the Stage I gate, state difference 1 to 2 from it.",
    ]


def _mean_curves(
    results: Sequence[Mapping[str, Any]], names: Sequence[str] = _DRAWN, budgets: Sequence[float] | None = None
) -> dict[str, Curve]:
    """Returns the curves at common budgets, averaged over seeds."""
    grid = np.linspace(1, results[0]["loops"], 13) if budgets is None else np.asarray(budgets)
    return {name: _mean_curve(results, name, grid) for name in names}


def _mean_curve(results: Sequence[Mapping[str, Any]], name: str, grid: np.ndarray) -> Curve:
    """Returns the curve of one family, averaged over seeds."""
    seeds = []
    for result in results:
        own, plain = (
            Frontier(**{key: np.asarray(result["families"][which]["curve"][key])[None] for key in _POINT})
            for which in (name, FIXED)
        )
        seeds.append(own.joined(plain).at(grid))

    loss, accuracy = (np.mean([getattr(curve, key) for curve in seeds], axis=0) for key in ("loss", "accuracy"))
    return Curve.of(grid, loss, accuracy)


EARLY_EXIT = EarlyExit()
