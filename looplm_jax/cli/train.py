"""The work of `looplm train`: announces the run, trains, and reports what was written."""

import dataclasses
import signal
import time

import jax

from looplm_jax.cli._common import exit_process
from looplm_jax.codec import to_dict
from looplm_jax.config import Recipe
from looplm_jax.distributed import JoinOptions, ProcessGroup, check_single_process, join
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import evaluate_held_out
from looplm_jax.evaluation._reports import evaluate_command, write_run_report
from looplm_jax.files import AnyPath
from looplm_jax.models import count_params
from looplm_jax.recipes._topologies import on_topology, settings_in_use
from looplm_jax.rl import rollout_collector
from looplm_jax.sharding import require_compilation, require_platform, topology_name
from looplm_jax.terminal import show
from looplm_jax.training._initialize_from import with_model_of_start
from looplm_jax.training._loggers import EventSink, WandbLog
from looplm_jax.training._profiling import ProfiledSteps
from looplm_jax.training._progress import progress_console
from looplm_jax.training.run import Outcome, train

_NEWS_SECONDS = 5.0  # in which the loss of another process is noticed


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of a user in addition to the recipe. `given` has the dotted paths of the fields that flags set."""

    given: frozenset[str] = frozenset()
    join_options: JoinOptions = dataclasses.field(default_factory=JoinOptions)
    profile: ProfiledSteps | None = None
    wandb_project: str | None = None


def run_training(recipe: Recipe, out: AnyPath, options: TrainOptions | None = None) -> int:
    """Trains, writes the report, and returns the exit status. A process stopped by signal n exits here with 128 + n.

    If one of several processes fails, all of them exit here: with status 2, or 75 if one was lost.
    """
    options = options or TrainOptions()
    group = join(options.join_options)

    if group.count == 1:
        check_single_process()
        return _run_training(recipe, out, options, group)

    try:
        status = _run_training(recipe, out, options, group)
    except UserError as error:
        group.abort_all(str(error), error.status)
    except jax.errors.JaxRuntimeError:  # maybe another process died, which the monitor is about to report
        time.sleep(_NEWS_SECONDS)
        raise

    group.shutdown()
    # After group.shutdown(), so that the others do not take this exit for a failure.
    jax.distributed.shutdown()
    return status


def _run_training(recipe: Recipe, out: AnyPath, options: TrainOptions, group: ProcessGroup) -> int:
    """Trains in this process and reports."""
    require_platform()
    require_compilation()
    # Only process 0 reports.
    console = progress_console(quiet=group.index > 0)
    recipe = with_model_of_start(recipe, out, options.given)
    recipe = on_topology(recipe, topology_name(jax.devices()), options.given)
    console.print(_announcement(recipe, out, group))
    if settings := settings_in_use(recipe):
        console.print(settings, markup=False)

    try:
        outcome = train(
            recipe,
            out,
            evaluate=evaluate_held_out,
            collect=rollout_collector(),
            console=console,
            group=group,
            # One process is enough for a trace.
            profile=options.profile if group.index == 0 else None,
            mirrors=_mirrors(recipe, out, options, group),
        )
    except KeyboardInterrupt:  # a second Ctrl-C does not wait for the last save
        exit_process(console, "interrupted", signal.SIGINT)

    if outcome.stopped_by is not None:
        group.shutdown()
        where = f"stopped by {outcome.stopped_by.name} at step {outcome.step}"
        exit_process(console, f"{where}; the same command resumes there", outcome.stopped_by)

    if group.index == 0:
        _report(recipe, out, outcome)
    return 0


def _report(recipe: Recipe, out: AnyPath, outcome: Outcome) -> None:
    """Writes the report and prints what was written."""
    reports = ", ".join(write_run_report(outcome.folder.path, recipe))
    skipped = f", {outcome.skipped} steps skipped" if outcome.skipped else ""
    show(f"trained {outcome.step} steps{skipped}; wrote checkpoints, metrics.jsonl, tensorboard, {reports} to {out}")
    show(f"next: {evaluate_command(out)}")


def _mirrors(recipe: Recipe, out: AnyPath, options: TrainOptions, group: ProcessGroup) -> list[EventSink]:
    """Returns the additional sinks of metrics."""
    if options.wandb_project is None or group.index > 0:
        return []
    return [WandbLog(options.wandb_project, name=out.name, config=to_dict(recipe))]


def _announcement(recipe: Recipe, out: AnyPath, group: ProcessGroup) -> str:
    """Returns the line that describes the run before it starts."""
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps, {stage.loops_text} loops)" for stage in recipe.stages)
    many = f"{group.count} processes; " if group.count > 1 else ""
    what = f"{recipe.name}: {count_params(recipe.model):,} parameters, {tokens:,} tokens; {stages}"
    return f"{what}; {many}writing to {out}"
