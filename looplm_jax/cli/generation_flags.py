"""Flags shared by `looplm generate` and `looplm chat`: how tokens are sampled, and how much they may cost."""

import argparse

EXIT_RULES = """\
exit rules, each optionally with bounds on loops, as in kl=1e-3,min=2,max=6:
  loops=4        a fixed number of loops
  q=0.5          the gate: the first loop where the probability of having left reaches q
  hidden=0.03    the state changed by less than this
  relative=0.03  likewise, as a share of its size
  kl=1e-3        the prediction changed by less than this, in nats
  entropy=1e-3   its entropy changed by less than this, in nats
  stable=2       the likeliest token was that of the loop before, so many times in a row
  confidence=0.9 the likeliest token reached this probability
  margin=0.5     its probability exceeds that of the next one by this
"""


def configure_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype`."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the parameters (default: as stored on a CPU, elsewhere that of the matrix products)",
    )


def configure_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the shared flags, and the list of exit rules as the epilog."""
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most probable; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest P; 1: all")
    parser.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="draw from those P times as probable as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="make tokens already there less likely"
    )

    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")

    parser.add_argument("--exit", default="q=0.5", metavar="RULE", help="see below (default: q=0.5)")
    parser.add_argument(
        "--loops-per-token",
        type=float,
        default=float("inf"),
        metavar="N",
        help="on average never more than this after the first",
    )
    parser.add_argument(
        "--ms-per-token", type=float, default=float("inf"), metavar="MS", help="give up loops to keep to this time"
    )

    parser.add_argument(
        "--cache",
        choices=["full", "last", "average", "first"],
        default="full",
        help="loops whose keys and values are kept of a new token (default: full)",
    )

    parser.add_argument("--step", type=int, help="which step (default: the latest valid one)")
    configure_dtype(parser)
    parser.epilog = EXIT_RULES
