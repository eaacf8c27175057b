"""What `looplm train` does around the training itself: say what will happen, and at the end what was written."""

import os
import sys
from pathlib import Path

from rich.console import Console

from looplm_jax.config import Recipe
from looplm_jax.evaluation.during_training import evaluate_held_out
from looplm_jax.evaluation.run_report import write_run_report
from looplm_jax.models.looplm import count_params
from looplm_jax.training.progress import progress_console
from looplm_jax.training.run import Outcome, train


def run_training(recipe: Recipe, out: Path) -> int:
    """Train, write the report, and return the exit status: 0, or 128 + n where signal n stopped the run."""
    console = progress_console()
    console.print(_announcement(recipe, out))
    outcome = train(recipe, out, evaluate=evaluate_held_out, console=console)
    if outcome.stopped_by is not None:
        return _stopped(outcome, console)
    reports = ", ".join(write_run_report(outcome.folder.path, recipe))
    skipped = f", {outcome.skipped} steps skipped" if outcome.skipped else ""
    print(f"trained {outcome.step} steps{skipped}; wrote checkpoints, metrics.jsonl, tensorboard, {reports} to {out}")
    print(f"next: looplm evaluate {out}")
    return 0


def _announcement(recipe: Recipe, out: Path) -> str:
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps, {stage.loops} loops)" for stage in recipe.stages)
    return f"{recipe.name}: {count_params(recipe.model):,} parameters, {tokens:,} tokens; {stages}; writing to {out}"


def _stopped(outcome: Outcome, console: Console) -> int:
    name = outcome.stopped_by.name if outcome.stopped_by else ""
    console.print(f"looplm: stopped by {name} at step {outcome.step}; the same command goes on from there")
    sys.stdout.flush()
    sys.stderr.flush()
    status = 128 + int(outcome.stopped_by or 0)
    os._exit(status)  # a compilation that was left behind must not hold the process, and everything is saved
