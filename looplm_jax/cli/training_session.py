"""What `looplm train` does around the training itself: say what will happen, and at the end what was written."""

import dataclasses
import signal
import time

import jax

from looplm_jax.cli.interrupts import leave
from looplm_jax.codec import to_dict
from looplm_jax.config import Recipe
from looplm_jax.distributed import Cluster, Join, check_alone, join
from looplm_jax.errors import UserError
from looplm_jax.evaluation.during_training import evaluate_held_out
from looplm_jax.evaluation.run_report import evaluate_command, write_run_report
from looplm_jax.files import AnyPath
from looplm_jax.models.looplm import count_params
from looplm_jax.printing import show
from looplm_jax.sharding import require_compilation, require_platform
from looplm_jax.training.metrics import EventSink
from looplm_jax.training.profiling import ProfiledSteps
from looplm_jax.training.progress import progress_console
from looplm_jax.training.run import Outcome, train
from looplm_jax.training.wandb_log import WandbLog

_NEWS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user may ask for besides the recipe."""

    told: Join = dataclasses.field(default_factory=Join)
    profile: ProfiledSteps | None = None
    wandb_project: str | None = None


def run_training(recipe: Recipe, out: AnyPath, options: Options | None = None) -> int:
    """Train, write the report, and return the exit status; a process that a signal stops ends here, with 128 + n.

    So do all of many processes where one of them cannot go on: with the status 2, or 75 where one was lost.
    """
    options = options or Options()
    cluster = join(options.told)
    if cluster.count == 1:
        check_alone()
        return _run_training(recipe, out, options, cluster)
    try:
        status = _run_training(recipe, out, options, cluster)
    except UserError as error:
        cluster.end(str(error), error.status)
    except jax.errors.JaxRuntimeError:  # perhaps because another process is gone, which then is about to be noticed
        time.sleep(_NEWS_SECONDS)
        raise
    cluster.leave()
    jax.distributed.shutdown()
    return status


def _run_training(recipe: Recipe, out: AnyPath, options: Options, cluster: Cluster) -> int:
    require_platform()
    require_compilation()
    console = progress_console(quiet=cluster.index > 0)
    console.print(_announcement(recipe, out, cluster))
    try:
        outcome = train(
            recipe,
            out,
            evaluate=evaluate_held_out,
            console=console,
            cluster=cluster,
            profile=options.profile if cluster.index == 0 else None,
            mirrors=_mirrors(recipe, out, options, cluster),
        )
    except KeyboardInterrupt:  # the second one: nobody waits for the last save
        leave(console, "interrupted", signal.SIGINT)
    if outcome.stopped_by is not None:
        cluster.leave()
        where = f"stopped by {outcome.stopped_by.name} at step {outcome.step}"
        leave(console, f"{where}; the same command goes on from there", outcome.stopped_by)
    if cluster.index == 0:
        _report(recipe, out, outcome)
    return 0


def _report(recipe: Recipe, out: AnyPath, outcome: Outcome) -> None:
    reports = ", ".join(write_run_report(outcome.folder.path, recipe))
    skipped = f", {outcome.skipped} steps skipped" if outcome.skipped else ""
    show(f"trained {outcome.step} steps{skipped}; wrote checkpoints, metrics.jsonl, tensorboard, {reports} to {out}")
    show(f"next: {evaluate_command(out)}")


def _mirrors(recipe: Recipe, out: AnyPath, options: Options, cluster: Cluster) -> list[EventSink]:
    if options.wandb_project is None or cluster.index > 0:
        return []
    return [WandbLog(options.wandb_project, name=out.name, config=to_dict(recipe))]


def _announcement(recipe: Recipe, out: AnyPath, cluster: Cluster) -> str:
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps, {stage.loops} loops)" for stage in recipe.stages)
    many = f"{cluster.count} processes; " if cluster.count > 1 else ""
    what = f"{recipe.name}: {count_params(recipe.model):,} parameters, {tokens:,} tokens; {stages}"
    return f"{what}; {many}writing to {out}"
