"""Run one of the paper's experiments, list the experiments, or report their results.

    looplm experiment list
    looplm experiment mano --scale cpu
    looplm experiment report

An experiment is a grid of runs. Finished cells are skipped, so the same command resumes where it stopped. `--share 2/4`
takes every fourth cell, starting with the second: give each process or host its own share, and the same folder.
"""

import argparse
from pathlib import Path

from looplm_jax.errors import UserError

_SCALES = ("smoke", "cpu", "gpu", "paper")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm experiment`."""
    parser.add_argument("name", help="an experiment, `list`, or `report`: what was found under --root")
    parser.add_argument("--scale", help=f"{', '.join(_SCALES)} (default: smoke)", default="smoke")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/experiments"), help="folder of all results (default: runs/experiments)"
    )
    parser.add_argument("--out", type=Path, help="folder of these results (default: ROOT/NAME/SCALE)")
    parser.add_argument("--share", default="1/1", metavar="PART/OF", help="take this share of the cells (default: 1/1)")


def run(arguments: argparse.Namespace) -> int:
    """Runs the experiment. Returns the exit status."""
    # Imported only when needed: experiments depend on all other modules, the commands included.
    try:
        from experiments.command import list_experiments, report_experiments, run_experiment
    except ModuleNotFoundError as error:
        # Another module is missing: an error of the experiments themselves.
        if error.name is None or error.name.partition(".")[0] != "experiments":
            raise
        raise UserError("the package `experiments` is not installed; install looplm_jax from its repository") from None

    if arguments.name == "list":
        return list_experiments(arguments.root)
    if arguments.name == "report":
        return report_experiments(arguments.root)
    return run_experiment(arguments)
