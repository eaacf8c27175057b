"""Show the contents of a checkpoint, and check whether it is valid: every step is read and checked against its digests.

For a prepared corpus: how many rows it has, from which sources, and what was left out.

looplm inspect runs/text-small
"""

import argparse
import json
from typing import TYPE_CHECKING

from looplm_jax.printing import complain, literal, show

if TYPE_CHECKING:
    from looplm_jax.checkpoints import StepReport


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm inspect`."""
    parser.add_argument("checkpoint", help="a run folder, its checkpoints folder, one step, or a prepared corpus")
    parser.add_argument("--step", type=int, help="only this step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints the summary. Returns 2 if a step is damaged or cannot be checked."""
    from looplm_jax.data.prepared.folder import is_prepared

    if is_prepared(arguments.checkpoint):
        from looplm_jax.cli.prepared_view import show_prepared

        return show_prepared(arguments.checkpoint, as_json=arguments.json)
    from looplm_jax.checkpoints import inspect_steps

    reports = inspect_steps(arguments.checkpoint, step=arguments.step)
    if arguments.json:
        print(json.dumps([report.to_json() for report in reports], indent=2))
    else:
        _print(arguments.checkpoint, reports)

    unsound = [report for report in reports if report.problem]
    for report in unsound:
        complain(f"step {report.step} {report.problem}")
    return 2 if unsound else 0


def _print(path: str, reports: "list[StepReport]") -> None:
    """Prints one row per step, newest first, and the configuration of the newest readable one."""
    from rich.console import Console
    from rich.table import Table

    from looplm_jax.files import pasted

    table = Table("step", "stage", "parameters", "bytes", "kept", "state")

    for report in reversed(reports):
        stage = report.metadata.extra.get("stage", "") if report.metadata else ""
        kept = "always" if report.permanent else "while new"
        state = "[red]damaged" if report.damage else "[yellow]unknown" if report.unknown else "[green]sound"
        sizes = f"{report.parameters:,}", f"{report.bytes:,}"
        table.add_row(str(report.step), literal(stage), *sizes, kept, state)
    Console(highlight=False).print(table)

    newest = next((report.metadata for report in reports if report.metadata), None)
    if newest is not None:
        model = ", ".join(f"{name}={value}" for name, value in newest.config["model"].items())
        show(f"recipe {newest.config['name']}: {model}")
        show(f"tokenizer {newest.tokenizer_kind}, sha256 {newest.tokenizer_fingerprint[:16]}…")
    show(f"next: looplm evaluate {pasted(path)}")
