"""Loss and accuracy at every depth, and loss against mean loops.

    looplm evaluate runs/text-small

Reads the held-out documents of the checkpoint's own data, or of other files.
"""

import argparse

from looplm_jax.errors import UserError


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `looplm evaluate`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, or one step")
    parser.add_argument("--step", type=int, help="which step (default: the newest good one)")
    parser.add_argument("--max-loops", type=int, metavar="T", help="deepest loop (default: twice the trained depth)")
    parser.add_argument("--sequences", type=int, metavar="N", help="held-out sequences (default: those of the recipe)")
    parser.add_argument(
        "--data", metavar="PATH", help="other files, a glob or a URL; their held-out documents are read"
    )
    parser.add_argument(
        "--validation-fraction", type=float, metavar="F", help="share of documents held out (default: the recipe's)"
    )
    parser.add_argument("--out", metavar="DIR", help="where to write (default: <run>/evaluation/step_N)")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, print the tables and write the files."""
    for name in ("max_loops", "sequences"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    from looplm_jax.cli.evaluation_session import run_evaluation

    return run_evaluation(arguments)
