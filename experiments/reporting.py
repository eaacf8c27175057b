"""What experiments report: result files, the speed of a run, and bootstrap intervals."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike
from rich.console import Console

from experiments.frame import FORMAT, Experiment, Record, Report, Scale
from looplm_jax import json_io
from looplm_jax.errors import UserError
from looplm_jax.files import write_atomically
from looplm_jax.training._goodput import Activity, shares, total_seconds
from looplm_jax.training._metrics import read_metrics
from looplm_jax.training._run_folder import read_recipe

# Result files


COMMAND = "python -m experiments"


def write_results(
    out: Path, experiment: Experiment, scale: Scale, records: Sequence[Record], cells: int, console: Console
) -> list[str]:
    """Prints the tables, and writes `results.json`, `report.md` and, if matplotlib is installed, the figures.

    Returns the names of the files.
    """
    report = show(experiment, records, console)
    figures = _draw(report, out, console)
    content = [dataclasses.asdict(record) for record in records]
    about = {"format": FORMAT, "experiment": experiment.name, "scale": scale.value, "cells": cells, "records": content}
    write_atomically(out / "results.json", (json_io.dumps(about, indent=1) + "\n").encode())
    write_atomically(out / "report.md", _markdown(experiment, scale, records, cells, report, figures).encode())
    return ["results.json", "report.md", *figures]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of a results file."""

    experiment: str
    scale: str
    cells: int  # in the whole grid
    records: Sequence[Record]


def read_results(path: Path) -> Results:
    """Reads a results file.

    Raises:
      UserError: the file is damaged, or has another version.
    """
    try:
        about = json.loads(path.read_text())
        # Checked before the fields, which may differ in another version.
        version = about.pop("format")
        if version == FORMAT:
            records = [
                Record(**{**values, "result": json_io.with_nan(values["result"])}) for values in about["records"]
            ]
            return Results(**{**about, "records": records})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is not a file of results; the experiment's command writes it again") from None

    raise UserError(f"{path} is of version {version}, and this is {FORMAT}; run the experiment with another --root")


def show(experiment: Experiment, records: Sequence[Record], console: Console) -> Report:
    """Prints the tables and findings of an experiment's records. Returns its report."""
    report = experiment.report(records)
    for table in report.tables:
        console.print(table.rich())

    for finding in report.findings:
        console.print(finding)
    return report


def _draw(report: Report, out: Path, console: Console) -> list[str]:
    """Draws the figures. Returns their names, or none if matplotlib is not installed."""
    try:
        for name, draw in report.figures.items():
            draw(out / name)
    except UserError as error:
        console.print(f"looplm: {error}")
        return []
    return list(report.figures)


def _markdown(
    experiment: Experiment,
    scale: Scale,
    records: Sequence[Record],
    cells: int,
    report: Report,
    figures: Sequence[str],
) -> str:
    """Returns the text of `report.md`."""
    hours = sum(record.seconds for record in records) / 3600
    versions = sorted({f"{name} {version}" for record in records for name, version in record.versions.items()})

    sections = [
        f"# {experiment.name}, at scale {scale.value}",
        experiment.claim[0].upper() + experiment.claim[1:] + ".",
        f"{len(records)} of {cells} cells, {hours:.2f} hours in all; {', '.join(versions)}.",
        *(f"## {table.title}\n\n{table.markdown()}" for table in report.tables),
        "\n".join(f"* {finding}" for finding in report.findings),
        *(f"![{name}]({name})" for name in figures),
        f"`{COMMAND} {experiment.name} --scale {scale.value}`",
    ]

    return "\n\n".join(section for section in sections if section) + "\n"


# Speed


def run_speed(folder: Path) -> dict[str, float]:
    """Returns the speed of a finished run.

    Returns:
      tokens_per_second: tokens of the packed rows, of which few may be targets and some are padding, per second of
        steps;
      share_in_steps: the fraction of the total time, including compilation, saves and evaluation, that was spent in
        steps;
      share_waiting_for_input.
    """
    recipe = read_recipe(folder / "config.json")
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    seconds = total_seconds(read_metrics(folder))
    parts = shares(seconds)

    return {
        "tokens_per_second": tokens / seconds[Activity.STEP],
        "share_in_steps": parts[Activity.STEP],
        "share_waiting_for_input": parts[Activity.INPUT],
    }


# Bootstrap intervals


_LEVEL = 0.95


def resamples(rows: int, count: int, seed: int = 0) -> Int[np.ndarray, "R N"]:
    """Returns how often each of `rows` is drawn in each of `count` resamples with replacement."""
    # Drawing rows with replacement gives multinomial counts.
    return np.random.default_rng(seed).multinomial(rows, np.full(rows, 1.0 / rows), size=count)


def interval(values: ArrayLike) -> tuple[float, float]:
    """Returns the 95 % percentile interval of a resampled statistic."""
    low, high = np.quantile(np.asarray(values, float), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


def union(intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Returns the span of all intervals: a conservative interval for several seeds on the same sequences."""
    return min(low for low, _ in intervals), max(high for _, high in intervals)
