"""What `looplm train` does around the training itself: say what will happen, and at the end what was written."""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from looplm_jax.config import Recipe
from looplm_jax.evaluation.during_training import evaluate_held_out
from looplm_jax.evaluation.run_report import write_run_report
from looplm_jax.models.looplm import count_params
from looplm_jax.training.progress import progress_console
from looplm_jax.training.run import train


def run_training(recipe: Recipe, out: Path) -> int:
    """Train, write the report, and return the exit status; a process that a signal stops ends here, with 128 + n."""
    console = progress_console()
    console.print(_announcement(recipe, out))
    try:
        outcome = train(recipe, out, evaluate=evaluate_held_out, console=console)
    except KeyboardInterrupt:  # the second one: nobody waits for the last save
        _leave(console, "interrupted", signal.SIGINT)
    if outcome.stopped_by is not None:
        where = f"stopped by {outcome.stopped_by.name} at step {outcome.step}"
        _leave(console, f"{where}; the same command goes on from there", outcome.stopped_by)
    reports = ", ".join(write_run_report(outcome.folder.path, recipe))
    skipped = f", {outcome.skipped} steps skipped" if outcome.skipped else ""
    print(f"trained {outcome.step} steps{skipped}; wrote checkpoints, metrics.jsonl, tensorboard, {reports} to {out}")
    print(f"next: looplm evaluate {out}")
    return 0


def _announcement(recipe: Recipe, out: Path) -> str:
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps, {stage.loops} loops)" for stage in recipe.stages)
    return f"{recipe.name}: {count_params(recipe.model):,} parameters, {tokens:,} tokens; {stages}; writing to {out}"


def _leave(console: Console, message: str, number: signal.Signals) -> NoReturn:
    """End the process without waiting for a compilation that was left behind, which Python would not survive."""
    console.print(f"looplm: {message}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(128 + number)
