"""Reports: the tables of an evaluation, and the report of a training run."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from looplm_jax.config import Recipe, Stage
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import DepthSweep, ExitCurve
from looplm_jax.evaluation._plots import plot_training
from looplm_jax.files import AnyPath, in_bucket, quoted, write_atomically
from looplm_jax.json_io import as_float, numbers
from looplm_jax.models._looplm import count_params
from looplm_jax.terminal import Table
from looplm_jax.training._goodput import time_summary, time_warnings, total_seconds
from looplm_jax.training._metrics import read_metrics

# Tables of evaluations


def depth_table(sweep: DepthSweep) -> Table:
    """Returns a table with one row per depth; the trained depth is marked."""
    curve = sweep.curve
    rows = [
        [str(int(loops)), f"{loss:.4f}", f"{accuracy:.2%}", _note(int(loops), sweep)]
        for loops, loss, accuracy in zip(curve.loops, curve.loss, curve.accuracy, strict=True)
    ]
    # A sweep may end before the trained depth.
    marked = sweep.trained_loops - 1 if sweep.trained_loops <= len(rows) else None
    return Table(
        title=f"every depth, {sweep.tokens:,} held-out tokens",
        columns=("loops", "loss (nats/token)", "accuracy", ""),
        rows=rows,
        marked=marked,
    )


def _note(loops: int, sweep: DepthSweep) -> str:
    """Returns the note of a depth: trained, best, both, or none."""
    # One depth may be both.
    notes = {sweep.best_loops: ["best"]}
    notes.setdefault(sweep.trained_loops, []).insert(0, "trained")
    return ", ".join(notes.get(loops, []))


def exit_table(exits: ExitCurve) -> Table:
    """Returns a table with one row per fixed depth, followed by one per q."""
    labels = [f"loops={int(loops)}" for loops in exits.fixed.loops] + [f"q={q:g}" for q in exits.q_grid]
    points = [
        point
        for curve in (exits.fixed, exits.q_exit)
        for point in zip(curve.loops, curve.loss, curve.accuracy, strict=True)
    ]

    rows = [
        [label, f"{loops:.2f}", f"{loss:.4f}", f"{accuracy:.2%}"]
        for label, (loops, loss, accuracy) in zip(labels, points, strict=True)
    ]

    return Table(
        title="early exit",
        columns=("--exit", "mean loops", "loss (nats/token)", "accuracy"),
        rows=rows,
    )


# The report of a training run


def write_run_report(folder: AnyPath, recipe: Recipe) -> list[str]:
    """Writes `report.md` from the metrics of a run, and `training.png` if matplotlib is installed.

    Returns the names of the files.

    Raises:
      UserError: the file system or the bucket refuses a write.
    """
    rows = read_metrics(folder)
    written = ["report.md"]

    started = f" Started from {recipe.start.checkpoint}." if recipe.start.checkpoint else ""
    lines = [f"# {recipe.name}", "", f"{count_params(recipe.model):,} parameters. {recipe.description}{started}", ""]
    lines += ["## Stages", "", _stage_table(recipe, rows).markdown()]

    figure = io.BytesIO()
    try:
        plot_training(rows, figure)
    except UserError as error:
        lines += [f"There is no figure: {error}.", ""]
    else:
        # Before the report, which links to it.
        write_atomically(folder / "training.png", figure.getvalue())
        lines += ["![training](training.png)", ""]
        written.append("training.png")

    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    if evaluations:
        lines += ["## Held-out loss during training (nats/token)", "", _evaluation_table(evaluations).markdown()]

    lines += [
        "## Time",
        "",
        time_summary(total_seconds(rows)),
        "",
        *(f"* {line}" for line in time_warnings(total_seconds(rows))),
        "",
    ]

    lines += [
        "## Next",
        "",
        "```",
        evaluate_command(folder),
        f"looplm generate {quoted(folder)} --prompt 'Once'",
        "```",
        "",
    ]

    write_atomically(folder / "report.md", "\n".join(lines).encode())
    return written


def evaluate_command(folder: AnyPath) -> str:
    """Returns the command that evaluates a run. For a run in a bucket, its output goes to a local folder."""
    out = f" --out {quoted(f'{folder.name}-evaluation')}" if in_bucket(folder) else ""
    return f"looplm evaluate {quoted(folder)}{out}"


def _stage_table(recipe: Recipe, rows: list[dict[str, Any]]) -> Table:
    """Returns the table with one row per stage."""
    columns = ("stage", "objective", "loops", "steps", "tokens", "last loss", "mean exit loop", "tokens/s", "skipped")
    return Table(title="stages", columns=columns, rows=[_stage_row(stage, rows) for stage in recipe.stages])


def _stage_row(stage: Stage, rows: list[dict[str, Any]]) -> list[str]:
    """Returns the row of one stage; the last cells are empty if no step was logged."""
    own = [row for row in rows if row["kind"] == "train" and row.get("stage") == stage.name]
    tokens = stage.steps * stage.batch_size * stage.sequence_length
    about = [stage.name, stage.objective.value, stage.loops_text, str(stage.steps), f"{tokens:,}"]
    if not own:
        return [*about, "", "", "", ""]

    # The median rate is robust against a few slow steps.
    last = own[-1]
    # `as_float` reads a missing rate as NaN.
    rates = sorted(filter(math.isfinite, (as_float(row.get("tokens_per_second")) for row in own)))
    loss, exit_loop, skipped = (as_float(last.get(name)) for name in ("loss", "mean_exit_loop", "skipped"))
    rate = rates[len(rates) // 2] if rates else math.nan
    return [*about, f"{loss:.4f}", f"{exit_loop:.2f}", f"{rate:,.0f}", f"{skipped:.0f}"]


def _evaluation_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of held-out losses, one row per evaluation and one column per loop."""
    losses = [numbers(row.get("loss_per_loop")) for row in rows]
    # Stages may have different numbers of loops.
    loops = max(map(len, losses))
    return Table(
        title="held-out loss",
        columns=("step", *(f"loop {loop}" for loop in range(1, loops + 1))),
        rows=[[str(row["step"]), *(f"{loss:.4f}" for loss in own)] for row, own in zip(rows, losses, strict=True)],
    )
