"""A training run, from a recipe to its last checkpoint.

A run is a folder. Started again with the same recipe, it resumes from its latest valid checkpoint with bit-identical
results: parameters, optimizer, guard, random key, position in the data and metrics are those of a run that was never
stopped.

A run starts or resumes in this order:

1. Check the folder: it is new, or contains this run (`check_run_folder`). Nothing is written before this.
2. Check that all processes have the same configuration, then lock the folder and check it again (`_owned`).
3. Check the shapes of the model, the mesh and the batches of every stage, and open the data (`prepare_run`).
4. If the folder has no checkpoint and the recipe starts from one, read that.
5. Write the recipe to the folder, and load or train the tokenizer.
6. Restore the latest valid checkpoint of the folder, or create the first state.
7. Check that all processes have the same documents, tokenizer and position.
8. Open the metrics at the restored step. Later lines are removed, because the run writes them again.
9. Train the remaining stages (`_train_stage`), beginning with the evaluation and the save that are due at the restored
   step. The stream of batches is opened at the saved position.
"""

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from rich.console import Console

from looplm_jax.checkpoints import CheckpointStore, Metadata, SaveError
from looplm_jax.codec import to_dict
from looplm_jax.config import Objective, Recipe, Stage
from looplm_jax.data import ValidationBatches
from looplm_jax.distributed import SINGLE_PROCESS, ProcessGroup, check_same
from looplm_jax.errors import UserError
from looplm_jax.halting import parse_exit_policy
from looplm_jax.models._looplm import LoopLM, Params
from looplm_jax.sharding import use_mesh
from looplm_jax.training._batches import held_out_batches, open_reader
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._depth import draw_depths, grows
from looplm_jax.training._feeds import Feed, OpenCollector, RolloutFeed, TextFeed
from looplm_jax.training._goodput import Activity, ActivityTimer, time_summary, time_warnings
from looplm_jax.training._initialize_from import with_model_of_start
from looplm_jax.training._loggers import EventSink
from looplm_jax.training._metrics import EVALUATION, Log, Reporter, open_log
from looplm_jax.training._notes import settings_without_effect
from looplm_jax.training._ownership import NotOwner, Ownership, own
from looplm_jax.training._profiling import ProfiledSteps, Profiler
from looplm_jax.training._progress import TrainingProgress, progress_console
from looplm_jax.training._rollout_log import RolloutLog
from looplm_jax.training._run_folder import RunFolder, check_run_folder
from looplm_jax.training._saving import AsyncSaver
from looplm_jax.training._setup import Position, Setup, prepare_run, run_fingerprint
from looplm_jax.training._state import TrainState, enter_stage, with_empty_guard
from looplm_jax.training._stopping import DataUnavailable, StopConsensus, Stopped, StopRequest

Evaluate = Callable[[LoopLM, Params, ValidationBatches], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a run: the last saved step, the number of skipped steps, and the signal that stopped it, if any."""

    folder: RunFolder
    step: int
    skipped: int
    stopped_by: signal.Signals | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """The objects that all stages of a run share. `rollout_log` is None in processes that do not write."""

    setup: Setup
    group: ProcessGroup
    ownership: Ownership
    log: Log
    progress: TrainingProgress
    stop: StopConsensus
    saver: AsyncSaver
    watch: ActivityTimer
    profiler: Profiler
    evaluate: Evaluate | None
    collect: OpenCollector | None
    rollout_log: RolloutLog | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StageEnd:
    """The state at the end of a stage, and the signal that stopped the run, if any."""

    state: TrainState
    stopped_by: signal.Signals | None


def train(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    evaluate: Evaluate | None = None,
    collect: OpenCollector | None = None,
    console: Console | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
    profile: ProfiledSteps | None = None,
    mirrors: Sequence[EventSink] = (),
) -> Outcome:
    """Trains through the stages of a recipe in the run folder `out`, or resumes an earlier run in it.

    Args:
      recipe: the configuration of the run.
      out: a new or empty folder, or one that contains this same run.
      evaluate: measures the parameters on held-out batches. Its results are added to the metrics.
      collect: generates the answers of stages with the objective `policy_gradient`, such as `rl.rollout_collector()`.
      console: the console for progress; by default standard error.
      group: the processes of the run, all of which must call this. Only process 0 prints and writes metrics.
      profile: steps to trace into the folder.
      mirrors: additional destinations of scalars.

    Raises:
      UserError: the data is invalid; the folder contains another run, is in use by another process, or was moved or
        removed during the run; shapes do not fit the devices; a process was started differently; a source disappeared;
        the last save was refused; or too many consecutive steps were skipped. Earlier checkpoints are intact.
    """
    _check_rollouts(recipe, collect)
    console = console or progress_console()
    watch = ActivityTimer()
    recipe = with_model_of_start(recipe, out)

    # Steps 1 and 2 of the order above: refuse the wrong folder, then own it.
    folder = check_run_folder(out, recipe)
    # The folder is compared too: processes with different folders would each start a run of their own.
    check_same(group, "configuration", {**to_dict(recipe), "out": str(folder.path)})

    with StopRequest() as request, contextlib.ExitStack() as closing:
        # Only process 0 writes to the folder, so only it holds the lock.
        ownership = _owned(folder, recipe, closing) if group.index == 0 else NotOwner()
        for note in settings_without_effect(recipe):
            console.print(note)

        # Steps 3 to 6, in a thread, so that a stop signal is noticed.
        stop = StopConsensus(group, request)
        try:
            setup = stop.run(lambda: prepare_run(recipe, folder, console, group, watch))
        except Stopped as stopped:
            # Nothing was trained yet, so there is nothing to save.
            return Outcome(folder=folder, step=_latest_step(folder), skipped=0, stopped_by=stopped.signal)

        # Step 7.
        check_same(group, "data", run_fingerprint(setup))

        saver = AsyncSaver(setup.store, group)
        if group.count == 1:  # with several processes, closing would wait for others that may have ended
            closing.push(_closed(setup.store, console))

        # Step 8.
        position = setup.position
        step = int(position.state.step)
        progress = closing.enter_context(TrainingProgress(console, total_steps=recipe.total_steps, step=step))
        log = closing.enter_context(open_log(folder.path, step, group, mirrors, warn=progress.warn))
        profiler = closing.enter_context(contextlib.closing(Profiler(folder.path / "profile", profile)))

        run = _Run(
            setup=setup,
            group=group,
            ownership=ownership,
            log=log,
            progress=progress,
            stop=stop,
            saver=saver,
            watch=watch,
            profiler=profiler,
            evaluate=evaluate,
            collect=collect,
            rollout_log=_open_rollout_log(recipe, folder, step, closing) if group.index == 0 else None,
        )
        # Step 9.
        end = _train_stages(run, position)

        # The last save must succeed. Earlier refusals are only reported.
        saver.finish()
        error = saver.pop_error()
        if error is not None:
            progress.warn(f"NOT SAVED: {error}; a later save succeeded")

        # A run that was already finished has no times to report.
        if int(end.state.step) > step:
            _log_time_breakdown(run)

    skipped = int(end.state.guard.skipped)
    return Outcome(folder=folder, step=int(end.state.step), skipped=skipped, stopped_by=end.stopped_by)


def _check_rollouts(recipe: Recipe, collect: OpenCollector | None) -> None:
    """Raises UserError if a stage needs rollouts, which nothing collects, or has an unknown exit policy."""
    for stage in recipe.stages:
        if stage.objective is not Objective.POLICY_GRADIENT:
            continue
        if collect is None:
            raise UserError(f"stage {stage.name} learns from rollouts; pass collect=looplm_jax.rl.rollout_collector()")
        parse_exit_policy(stage.policy.exits)


def _open_rollout_log(recipe: Recipe, folder: RunFolder, step: int, closing: contextlib.ExitStack) -> RolloutLog | None:
    """Returns the log of rollouts at a step, or None if no stage has any."""
    if all(stage.objective is not Objective.POLICY_GRADIENT for stage in recipe.stages):
        return None
    return closing.enter_context(contextlib.closing(RolloutLog(folder.path, step=step)))


def _closed(store: CheckpointStore, console: Console) -> Callable[..., None]:
    """Returns a callback that closes the store when a run ends.

    A failing save does not hide the error that ended the run.
    """

    def close(_: object, ended_by: BaseException | None, __: object) -> None:
        try:
            store.close()
        except SaveError as error:
            if ended_by is None:
                raise
            console.print(f"NOT SAVED: {error}", style="yellow", markup=False)

    return close


def _owned(folder: RunFolder, recipe: Recipe, closing: contextlib.ExitStack) -> Ownership:
    """Owns the folder until `closing` ends, and checks it again, because another run may have written to it before."""
    ownership = closing.enter_context(own(folder.path))
    check_run_folder(folder.path, recipe)
    return ownership


# Stages


def _train_stages(run: _Run, position: Position) -> _StageEnd:
    """Runs the remaining steps of a stage and all later stages, or until the run is stopped."""
    setup = run.setup
    end = _train_stage(run, position)

    while end.stopped_by is None and position.stage + 1 < len(setup.recipe.stages):
        stage = position.stage + 1
        state = enter_stage(end.state, setup.recipe, setup.models[stage], stage, setup.meshes[stage])
        position = Position(state=state, stage=stage, data_state=None)
        end = _train_stage(run, position)

    return end


def _train_stage(run: _Run, position: Position) -> _StageEnd:
    """Runs the remaining steps of a stage, each followed by the evaluation and the save that are due after it.

    Every iteration evaluates and saves what is due, makes all processes agree to continue, and dispatches one step. A
    stop request or missing data saves the current step first.
    """
    recipe, mesh = run.setup.recipe, run.setup.meshes[position.stage]
    stage = recipe.stages[position.stage]
    first = sum(earlier.steps for earlier in recipe.stages[: position.stage])
    last = first + stage.steps

    state, done = position.state, int(position.state.step)
    key = jax.device_get(state.key)

    held_out = held_out_batches(run.setup, position.stage) if run.evaluate is not None else None

    model = run.setup.models[position.stage]
    programs = StagePrograms(recipe, model, stage, mesh, first_step=first)
    reporter = Reporter(recipe, stage, mesh, run.log, run.progress, run.watch)

    with contextlib.closing(_open_feed(run, position, reporter)) as feed:

        def save() -> None:
            """Saves the current step, after the metrics that lead to it."""
            reporter.flush()
            _save(run, stage, state, done, feed, permanent=done == last)

        try:
            while True:
                # Evaluation and save come before the next step, so a run that was stopped during an evaluation repeats
                # it on resume.
                if first < done and _is_due(done, recipe.evaluation.every, last):
                    reporter.flush()
                    _evaluate(run, mesh, model, state, done, held_out)
                    reporter.restart_clock()
                if first < done and _is_due(done, recipe.checkpoint.every, last):
                    save()

                if done == last:
                    # After the save, so that the next stage resumes from a checkpoint of this one.
                    return _StageEnd(state=state, stopped_by=None)

                # If the folder was moved or another process has taken it over, no further step is computed.
                run.ownership.check()

                # The next batch is read while the devices compute the previous step. A failure is not raised here but
                # agreed on, so that all processes stop at the same step.
                failure = feed.read_ahead()
                run.watch.charge(Activity.STEP if reporter.waiting else Activity.INPUT)
                run.stop.check(failure)
                _report_save_error(run, stage, done)

                depths = draw_depths(stage, key, done, first)
                if grows(stage, done, first):
                    # Losses of fewer loops say nothing about spikes of more.
                    state = with_empty_guard(state)
                    run.progress.say(f"stage {stage.name} has {depths[0]} loops from step {done + 1} on")

                feed.prepare(state.params, done)
                loops, columns = programs.loops_of(depths), feed.columns
                if not programs.compiled(loops, columns):
                    run.progress.say(f"compiling stage {stage.name} for {loops} loops")
                    # In a thread, because a large program compiles for minutes, and a stop signal must not wait for
                    # that.
                    run.stop.run(functools.partial(programs.compile, loops, columns))
                    run.watch.charge(Activity.COMPILE)
                    # Tokens per second are those of training alone.
                    reporter.restart_clock()

                # Dispatched without waiting: the devices compute while the host reports the previous step and reads the
                # next batch.
                run.profiler.before(done + 1)
                state, metrics = programs.run(loops, state, feed.next(depths), columns)
                done += 1
                feed.taken(done)
                reporter.add(done, _logged_loops(depths), metrics, feed.measured)

                run.profiler.after(done, metrics)
                run.watch.charge(Activity.STEP)
        except Stopped as stopped:
            save()
            return _StageEnd(state=state, stopped_by=stopped.signal)
        except DataUnavailable as unavailable:
            save()
            # The message says that the step is saved, so the asynchronous save has to end first.
            run.saver.finish()
            raise UserError(
                f"{unavailable}; step {done} is saved; fix that, and the same command resumes from there"
            ) from None


def _logged_loops(depths: Int[np.ndarray, "B"]) -> int | float:
    """Returns the number of loops of a step, or the mean over its sequences if they differ."""
    return int(depths[0]) if (depths == depths[0]).all() else float(depths.mean())


def _open_feed(run: _Run, position: Position, reporter: Reporter) -> Feed:
    """Opens the batches of a stage: text, or rollouts of the parameters."""
    stage, mesh = run.setup.recipe.stages[position.stage], run.setup.meshes[position.stage]
    if stage.objective is not Objective.POLICY_GRADIENT:
        reader = open_reader(run.setup, position, run.progress.warn)
        return TextFeed(reader, lambda batch, depths: to_device(batch, stage, mesh, depths))

    assert run.collect is not None
    return RolloutFeed(
        run.collect(run.setup, position.stage, run.group),
        stage,
        run.setup.models[position.stage].config,
        mesh,
        group=run.group,
        reporter=reporter,
        stop=run.stop,
        watch=run.watch,
        log=run.rollout_log,
    )


# Evaluation and saving


def _evaluate(
    run: _Run, mesh: Mesh, model: LoopLM, state: TrainState, step: int, held_out: ValidationBatches | None
) -> None:
    """Evaluates the parameters and logs the results, unless an earlier process has done so at this step."""
    # The metrics already have an evaluation at this step if the run was stopped between evaluating and saving.
    evaluate = run.evaluate
    if evaluate is None or held_out is None or run.log.evaluated(step):
        return

    def measure(batches: ValidationBatches) -> Mapping[str, Any]:
        with use_mesh(mesh):
            return evaluate(model, state.params, batches)

    run.watch.charge(Activity.STEP)
    run.log.write(EVALUATION, step, run.stop.run_over(measure, held_out))
    run.watch.charge(Activity.EVALUATION)


def _save(run: _Run, stage: Stage, state: TrainState, step: int, feed: Feed, *, permanent: bool) -> None:
    """Saves a step with its metadata, and the metrics up to it."""
    metadata = Metadata(
        config=to_dict(run.setup.recipe),
        tokenizer_kind=run.setup.tokenizer.kind,
        tokenizer=run.setup.tokenizer.serialize(),
        tokenizer_fingerprint=run.setup.tokenizer.fingerprint,
        data_state=feed.state(),
        extra={"stage": stage.name},
    )

    run.watch.charge(Activity.STEP)
    # Another process may have taken over since the last step. Its checkpoints must not be replaced.
    run.ownership.check()
    # The metrics up to this step must be stored before the checkpoint from which a run may resume.
    run.log.flush()
    feed.flush()
    run.saver.save(step, state, metadata, permanent=permanent)
    run.watch.charge(Activity.SAVE)


# Reporting


def _report_save_error(run: _Run, stage: Stage, step: int) -> None:
    """Warns about a refused save. The training continues."""
    error = run.saver.pop_error()
    if error is not None:
        run.progress.warn(f"{stage.name}  step {step}  NOT SAVED: {error}; training continues")


def _log_time_breakdown(run: _Run) -> None:
    """Prints how the time was spent, and how to view the profile."""
    run.watch.charge(Activity.OTHER)
    seconds = run.watch.total()
    run.progress.say(time_summary(seconds))
    for warning in time_warnings(seconds):
        run.progress.warn(f"warning: {warning}")

    how = run.profiler.how_to_open()
    if how is not None:
        run.progress.say(how)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _latest_step(folder: RunFolder) -> int:
    # `keep` has no effect on listing the steps.
    steps = CheckpointStore(folder.checkpoints, keep=1).steps()
    return steps[-1] if steps else 0
