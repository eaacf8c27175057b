"""What a checkpoint holds, and whether it is sound: every step is read and checked against its digests.

    looplm inspect runs/text-small
"""

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `looplm inspect`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, or one step")
    parser.add_argument("--step", type=int, help="only this step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the summary; status 2 if a step is damaged."""
    from looplm_jax.checkpoints import inspect_steps

    reports = inspect_steps(arguments.checkpoint, step=arguments.step)
    damaged = [report for report in reports if report.damage]
    if arguments.json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        _print(arguments.checkpoint, reports)
    return 2 if damaged else 0
