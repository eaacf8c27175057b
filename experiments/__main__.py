"""Runs an experiment, lists all experiments, or reports their results.

    python -m experiments list
    python -m experiments mano --scale cpu
    python -m experiments report

An experiment is a grid of runs. Finished cells are skipped, so the same command resumes where it stopped. `--share 2/4`
takes every fourth cell, starting with the second: give each process or host its own share, and the same folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from looplm_jax.cli._common import expand_paths
from looplm_jax.cli._compilation_cache import OFF, keep_compiled_programs
from looplm_jax.cli.main import Parser, exit_status

_SCALES = ("smoke", "cpu", "gpu", "paper")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, 2 for a user error, or 128 + n if signal n stopped it."""
    return exit_status(lambda: _run(_parser().parse_args(argv)))


def _parser() -> Parser:
    """Returns the parser of the command line."""
    parser = Parser(
        prog="python -m experiments",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="an experiment, `list`, or `report`: the results under --root")
    parser.add_argument("--scale", help=f"{', '.join(_SCALES)} (default: smoke)", default="smoke")
    parser.add_argument(
        "--root", type=Path, default=Path("runs/experiments"), help="folder of all results (default: runs/experiments)"
    )
    parser.add_argument("--out", type=Path, help="folder of these results (default: ROOT/NAME/SCALE)")
    parser.add_argument("--share", default="1/1", metavar="PART/OF", help="take this share of the cells (default: 1/1)")
    parser.add_argument(OFF, action="store_true", help="do not keep compiled programs in ~/.cache/looplm_jax")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    """Runs what the arguments name. Returns the exit status."""
    expand_paths(arguments)
    if not arguments.no_compilation_cache:
        keep_compiled_programs()

    # Imported only now, because the compilation cache has to be set up before JAX is imported.
    from experiments.command import list_experiments, report_experiments, run_experiment

    if arguments.name == "list":
        return list_experiments(arguments.root)
    if arguments.name == "report":
        return report_experiments(arguments.root)
    return run_experiment(
        arguments.name, scale=arguments.scale, root=arguments.root, out=arguments.out, share=arguments.share
    )


if __name__ == "__main__":
    sys.exit(main())
