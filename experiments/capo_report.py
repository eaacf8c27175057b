"""The report of Capo: bits per parameter with and without loops, by depth and by exposures."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.frame import Record, Report
from looplm_jax.evaluation import Table, figure, save_figure

_PRINTED = "about 2 after 1,000 exposures, about 1 after 100"
Model = tuple[int, str, int]  # people, shape, parameters


def capo_report(records: Sequence[Record]) -> Report:
    """Returns tables, figures, and a sentence for each model that was trained with and without loops."""
    models = _by_model(records)
    return Report(
        tables=(_capacity(models), _by_depth(models), _by_exposures(models)),
        findings=_compare(models),
        figures={"capo.png": functools.partial(_plot, models)},
    )


def _by_model(records: Sequence[Record]) -> dict[Model, list[Record]]:
    """Groups the records, one per seed, by model."""
    found: dict[Model, list[Record]] = {}
    for record in records:
        result = record.result
        found.setdefault((result["people"], result["shape"], result["parameters"]), []).append(record)
    return found


def _known(records: Sequence[Record]) -> np.ndarray:
    """Returns bits per parameter after the last trained loop, for each seed."""
    return np.array([record.result["at_trained_depth"] for record in records])


def _capacity(models: dict[Model, list[Record]]) -> Table:
    """Returns the table of knowledge per model."""
    rows = []
    for (people, shape, parameters), records in models.items():
        bits, result = _known(records), records[0].result
        # Index of the last trained loop, from the T of "k⊗T".
        depth = int(shape.split("⊗")[1]) - 1

        rows.append(
            [
                shape,
                f"{parameters:,}",
                f"{people:,}",
                str(len(records)),
                f"{result['exposures']:.0f}",
                f"{bits.mean():.3f} ({bits.min():.3f} to {bits.max():.3f})",
                f"{result['most']:.2f}",
                _PRINTED,
                *(f"{np.mean([record.result[kind][depth] for record in records]):.2f}" for kind in ("name", "value")),
            ]
        )

    columns = [
        "layers ⊗ loops",
        "parameters",
        "people",
        "seeds",
        "exposures",
        "bits a parameter: mean (range)",
        "R_max",
    ]
    columns += ["printed", "nats: name", "nats: values"]
    return Table(title="Capo: knowledge after the last trained loop", columns=columns, rows=rows)


def _by_depth(models: dict[Model, list[Record]]) -> Table:
    """Returns the table of bits per parameter at depths up to twice the trained one."""
    means = {model: np.mean([record.result["bits"] for record in records], axis=0) for model, records in models.items()}
    most = max(map(len, means.values()))
    rows = [
        [shape, f"{people:,}", *(f"{bits:.3f}" for bits in mean), *[""] * (most - len(mean))]
        for (people, shape, _), mean in means.items()
    ]
    columns = ("layers ⊗ loops", "people", *(f"loop {loop}" for loop in range(1, most + 1)))
    return Table(title="Capo: bits a parameter by loops at test", columns=columns, rows=rows)


def _by_exposures(models: dict[Model, list[Record]]) -> Table:
    """Returns the table of bits over the training of the first seed, whose learning rate decays to the end."""
    curves = {model: records[0].result["curve"] for model, records in models.items()}
    most = max(map(len, curves.values()))
    rows = [
        [shape, f"{people:,}", *(f"{seen:.0f}: {bits:.2f}" for seen, bits in curve), *[""] * (most - len(curve))]
        for (people, shape, _), curve in curves.items()
    ]
    columns = ("layers ⊗ loops", "people", *[""] * most)
    return Table(title="Capo: exposures, and bits a parameter by then", columns=columns, rows=rows)


def _compare(models: dict[Model, list[Record]]) -> list[str]:
    """Returns one sentence per looped model whose plain twin was run: the gain of looping."""
    findings = []
    for (people, shape, parameters), records in models.items():
        layers, loops = shape.split("⊗")
        # Looping adds no parameters, so the twin has the same number.
        plain = models.get((people, f"{layers}⊗1", parameters))

        if loops != "1" and plain:
            ours, theirs = _known(records).mean(), _known(plain).mean()
            findings.append(
                f"{shape} against {layers}⊗1 at {parameters:,} parameters, {people:,} people and "
                f"{records[0].result['exposures']:.0f} exposures: {ours:.3f} against {theirs:.3f} bits a parameter, "
                f"{ours / theirs - 1:+.1%}; R_max is {records[0].result['most']:.2f}."
            )
    return findings


def _plot(models: dict[Model, list[Record]], path: Path) -> None:
    """Plots bits per parameter by exposures, and by loops at test. Raises UserError without matplotlib."""
    made, (left, right) = figure(columns=2)
    from matplotlib.ticker import MaxNLocator  # after `figure`, which reports that matplotlib is missing

    for number, ((people, shape, _), records) in enumerate(models.items()):
        about: dict[str, Any] = {"color": f"C{number}", "label": f"{shape}, {people:,} people"}
        for place, record in enumerate(records):
            seen, bits = zip(*record.result["curve"], strict=True)
            # One legend entry per model, not per seed.
            left.plot(seen, bits, marker=".", **(about if place == 0 else {"color": about["color"]}))

        # Mean over seeds, and a band for their range.
        depths = np.array([record.result["bits"] for record in records])
        loops = np.arange(1, depths.shape[1] + 1)
        right.plot(loops, depths.mean(0), marker="o", **about)
        right.fill_between(loops, depths.min(0), depths.max(0), color=about["color"], alpha=0.15, linewidth=0)

    # A set: both shapes of a pair have the same maximum.
    for people, most in {(people, records[0].result["most"]) for (people, _, _), records in models.items()}:
        left.axhline(most, color="#888888", linestyle="--", linewidth=1)
        left.text(0, most, f"all there is to know of {people:,} people", va="bottom", color="#666666", fontsize=8)

    left.set(title="Capo: in training", xlabel="exposures", ylabel="bits a parameter", xlim=(0, None), ylim=(0, None))
    right.set(title="Capo: at test", xlabel="loops at test", ylabel="bits a parameter", ylim=(0, None))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, loc="center left")
    save_figure(made, path)
