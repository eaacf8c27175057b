"""The bodies of `python -m experiments`: run an experiment, list all, or report their results."""

import functools
import sys
from pathlib import Path

from rich.console import Console

from experiments.frame import Experiment, Grid, Scale, Share
from experiments.registry import EXPERIMENTS
from experiments.reporting import COMMAND, read_results, show, write_results
from looplm_jax.cli._common import exit_process
from looplm_jax.errors import UserError, suggest
from looplm_jax.evaluation import Table
from looplm_jax.files import quoted
from looplm_jax.training._stopping import Stopped


def run_experiment(name: str, *, scale: str, root: Path, out: Path | None, share: str) -> int:
    """Runs a share of an experiment's grid, and reports all finished cells; a signal ends the process.

    Results go to `out`, or to a folder below `root`.

    Raises:
      UserError: the name, scale or share is unknown, the grid is empty, or the folder has other results.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"no such experiment {name!r}{suggest(name, EXPERIMENTS)}")

    experiment, mine = EXPERIMENTS[name], Share.parse(share)
    size = _scale(scale, experiment)
    cells = experiment.cells(size)
    if not cells:
        raise UserError(f"{name} has no cells at --scale {scale}; give it at least one shape and one seed")

    out = out or root / name / scale
    grid = Grid(folder=out, experiment=name, scale=scale)
    # Before the first cell: a folder of other results is refused.
    grid.open()
    console = Console(stderr=True, highlight=False)
    again = f"{COMMAND} {name} --scale {scale} --out {quoted(out)}"

    try:
        outcome = grid.run(cells, functools.partial(experiment.run, console=console), mine, console.print)
    except Stopped as stopped:
        exit_process(console, f"stopped by {stopped.signal.name}; the same command resumes there", stopped.signal)

    records, failed = outcome.records, outcome.failed
    if records:
        # Also after a failure, so that finished cells are in the report.
        written = write_results(out, experiment, size, records, len(cells), _for_tables())
        print(f"wrote {', '.join(written)} to {out}")

    if failed:
        raise UserError(
            f"not finished: {', '.join(failed)} ({next(iter(failed.values()))}); fix that and run the same command "
            "again; finished cells are kept"
        )

    if not records:
        print(f"no cell of this share; next: {again}")
        return 0
    print(f"next: {COMMAND} report" if len(records) == len(cells) else f"next: {again}")
    return 0


def list_experiments(root: Path) -> int:
    """Lists every experiment, its claim, and how many cells of each scale are finished."""
    rows = []
    for name, experiment in EXPERIMENTS.items():
        for scale in experiment.scales:
            cells = experiment.cells(scale)
            done = sum((root / name / scale.value / "cells" / cell.name / "record.json").exists() for cell in cells)
            rows.append([name, scale.value, f"{done} of {len(cells)}", experiment.claim])

    columns = ("experiment", "scale", "cells done", "what it tests")
    Console(highlight=False, soft_wrap=True).print(Table(title="experiments", columns=columns, rows=rows).rich())
    print(f"next: {COMMAND} {next(iter(EXPERIMENTS))} --scale cpu")
    return 0


def report_experiments(root: Path) -> int:
    """Prints the tables and findings of all results below a folder. Raises UserError if a file is damaged."""
    found = sorted(root.glob("*/*/results.json"))
    if not found:
        print(f"looplm: no results in {root}", file=sys.stderr)
        print(f"next: {COMMAND} {next(iter(EXPERIMENTS))} --scale cpu")
        return 0

    console = _for_tables()
    for path in found:
        results = read_results(path)
        if results.experiment not in EXPERIMENTS:
            raise UserError(f"{path}: no such experiment {results.experiment!r}; remove the file")
        console.print(f"\n{results.experiment}, {results.scale}: {len(results.records)} of {results.cells} cells")
        show(EXPERIMENTS[results.experiment], results.records, console)

    print(f"figures are beside each results.json in {root}; next: {COMMAND} list")
    return 0


def _for_tables() -> Console:
    """Returns a console that does not squeeze tables: a terminal wraps their lines, and a file has them whole."""
    return Console(highlight=False, soft_wrap=True, width=1000)


def _scale(text: str, experiment: Experiment) -> Scale:
    """Returns a scale of the experiment. Raises UserError if it has no such scale."""
    values = [scale.value for scale in experiment.scales]
    if text not in values:
        raise UserError(f"{experiment.name} has no scale {text!r}{suggest(text, values)}")
    return Scale(text)
