"""Runs `looplm plan --decode`: checks the request, shows progress, and prints the plan."""

from pathlib import Path

from rich.console import Console

from looplm_jax.cli.decode_plan_table import print_decode
from looplm_jax.cli.interrupts import leave
from looplm_jax.cli.plan_session import Progress, check_out, write_plan
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError
from looplm_jax.planning._decode_plan import DecodeRequest, check_heads, plan_decode
from looplm_jax.planning._targets import find_target
from looplm_jax.printing import show
from looplm_jax.training._progress import progress_console
from looplm_jax.training._stopping import Stopped, StopRequest


def run_decode_plan(recipe: Recipe, request: DecodeRequest, *, given: str, topology: str, out: Path | None) -> int:
    """Plans a tick, then prints and writes the plan. Returns 1 if it does not fit; a signal ends the process."""
    # All checks precede the compilation, which may take minutes.
    check_out(out)
    request.check(recipe.model)

    target = find_target(topology)
    if target.devices[0].platform != "tpu":
        raise UserError(f"--decode plans for TPUs, unlike {target.name}; choose a slice such as v5e:1x1")
    check_heads(recipe.model, target)

    console = progress_console()
    with StopRequest() as stop:
        try:
            what = f"a tick of {request.slots} slots for {target.name}"
            plan = Progress(console, stop).compile(
                what, lambda: plan_decode(recipe.model, recipe.compute, request, target)
            )
        except Stopped as stopped:
            leave(console, f"stopped by {stopped.signal.name}; nothing was written", stopped.signal)

    print_decode(given, plan, Console(highlight=False, soft_wrap=True))
    write_plan(out, [plan.to_json()])
    if not plan.fits:
        show("next: the same command with one of the changes above")
    return 0 if plan.fits else 1
