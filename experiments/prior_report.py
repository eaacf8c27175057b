"""Tables and figures of the priors over exit steps: which one trains best, and which depths each uses."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.experiment import Record, Report
from looplm_jax.evaluation import Table, figure, save_figure

UNIFORM = "uniform"

Results = Mapping[str, Sequence[Mapping[str, Any]]]


def prior_report(records: Sequence[Record]) -> Report:
    """Returns a table of the priors, the depths they use, and the training curves."""
    by_prior: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_prior.setdefault(record.result["prior"], []).append(record.result)

    return Report(
        tables=[_table(by_prior), _depths(by_prior)],
        findings=_findings(by_prior),
        figures={"priors.png": functools.partial(_plot, by_prior)},
    )


def _table(by_prior: Results) -> Table:
    """Returns the table of losses, one row per prior."""
    columns = ("prior", "seeds", "training loss", "range", "at full depth", "held-out, by exits", "at full depth")
    rows = []

    for prior, results in by_prior.items():
        training = np.array([result["training_loss"] for result in results])
        rows.append(
            [
                prior,
                str(len(results)),
                f"{training.mean():.4f}",
                f"{training.min():.4f} to {training.max():.4f}",
                f"{np.mean([result['loss_per_loop'][-1] for result in results]):.4f}",
                f"{np.mean([result['held_out']['expected_loss'] for result in results]):.4f}",
                f"{np.mean([_full_depth(result) for result in results]):.4f}",
            ]
        )

    title = "Prior over exit steps: loss (nats/token), mean of seeds"
    marked = list(by_prior).index(UNIFORM) if UNIFORM in by_prior else None
    return Table(title=title, columns=columns, rows=rows, marked=marked)


def _depths(by_prior: Results) -> Table:
    """Returns the table of exits and losses per loop, one row per prior."""
    loops = next(iter(by_prior.values()))[0]["loops"]
    columns = ["prior", "mean exit loop", "entropy (nats)"]
    columns += [f"exits at {loop}" for loop in range(1, loops + 1)] + [
        f"loss at {loop}" for loop in range(1, loops + 1)
    ]

    rows = []
    for prior, results in by_prior.items():
        held_out = [result["held_out"] for result in results]
        shares = np.mean([each["exit_pdf"] for each in held_out], axis=0)
        losses = np.mean([each["loss"][:loops] for each in held_out], axis=0)
        rows.append(
            [
                prior,
                f"{np.mean([each['mean_exit_loop'] for each in held_out]):.2f}",
                f"{np.mean([result['exit_entropy'] for result in results]):.3f}",
                *(f"{share:.1%}" for share in shares),
                *(f"{loss:.4f}" for loss in losses),
            ]
        )

    return Table(
        title=f"Depths that are used, held-out text (entropy at most {np.log(loops):.3f})", columns=columns, rows=rows
    )


def _full_depth(result: Mapping[str, Any]) -> float:
    """Returns the held-out loss at the trained depth."""
    return float(result["held_out"]["loss"][result["loops"] - 1])


def _findings(by_prior: Results) -> list[str]:
    """Returns the best prior, and the differences from uniform per seed: equal seeds see the same data."""
    means = {prior: np.mean([result["training_loss"] for result in results]) for prior, results in by_prior.items()}
    best = min(means, key=lambda prior: means[prior])
    found = [f"The lowest training loss: {best} ({means[best]:.4f} nats a token). Printed: uniform."]

    if UNIFORM not in by_prior:
        return found
    for prior, results in by_prior.items():
        pairs = list(zip(results, by_prior[UNIFORM], strict=False))
        if prior != UNIFORM and pairs:
            training = ", ".join(f"{own['training_loss'] - base['training_loss']:+.4f}" for own, base in pairs)
            deep = ", ".join(f"{_full_depth(own) - _full_depth(base):+.4f}" for own, base in pairs)
            found.append(
                f"{prior} against uniform, seed by seed: training loss {training}; held-out loss at full depth {deep}."
            )
    return found


def _plot(by_prior: Results, path: Path) -> None:
    """Plots the first seed's training loss, a moving mean over a tenth of the steps, and the exits by loop."""
    made, (left, right) = figure(columns=2)

    for number, (prior, results) in enumerate(by_prior.items()):
        steps, losses = np.array(results[0]["curve"]).T
        # of the moving mean, in logged steps
        width = max(len(steps) // 10, 1)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        left.plot(steps[width - 1 :], smooth, color=f"C{number}", label=prior)
        shares = np.mean([result["held_out"]["exit_pdf"] for result in results], axis=0)
        right.plot(range(1, len(shares) + 1), 100 * shares, marker="o", color=f"C{number}", label=prior)

    left.set(xlabel="step", ylabel="expected training loss (nats/token)")
    left.legend(frameon=False)
    right.set(xlabel="loop", ylabel="exits (%)", ylim=(0, None))
    right.set_xticks(range(1, next(iter(by_prior.values()))[0]["loops"] + 1))
    save_figure(made, path)
