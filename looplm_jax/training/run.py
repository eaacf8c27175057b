"""A training run, from a recipe to its last checkpoint: the story that `looplm train` tells.

A run is a folder. Started again with the same recipe it goes on from its newest good checkpoint, bit for bit as if
it had never stopped: parameters, optimiser, guard, random key, place in the data and metrics.
"""

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from looplm_jax import data
from looplm_jax.checkpoints import CheckpointStore, Metadata, SaveError
from looplm_jax.codec import to_dict
from looplm_jax.config import Recipe, Stage
from looplm_jax.data import ValidationBatches
from looplm_jax.data.iterator import BatchIterator
from looplm_jax.distributed import ALONE, Cluster, check_same
from looplm_jax.errors import UserError
from looplm_jax.models.looplm import LoopLM, Params
from looplm_jax.sharding import process_rows, use_mesh
from looplm_jax.training.agreement import Agreement, OutOfData
from looplm_jax.training.goodput import Activity, Stopwatch, summary, warnings
from looplm_jax.training.metrics import EVALUATION, EventSink, Log, open_log
from looplm_jax.training.no_effect import settings_without_effect
from looplm_jax.training.ownership import NotOwner, Ownership, own
from looplm_jax.training.profiling import ProfiledSteps, Profiler
from looplm_jax.training.program import StagePrograms, draw_loops, place
from looplm_jax.training.progress import TrainingProgress, progress_console
from looplm_jax.training.reading import Reader
from looplm_jax.training.reporter import Reporter
from looplm_jax.training.run_folder import RunFolder, check_folder
from looplm_jax.training.saving import Saver
from looplm_jax.training.setup import Position, Setup, identities, prepare
from looplm_jax.training.signals import Stopped, StopRequest
from looplm_jax.training.state import TrainState, enter_stage

Evaluate = Callable[[LoopLM, Params, ValidationBatches], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: at which saved step, how many steps the guard skipped, and by which signal if it was stopped."""

    folder: RunFolder
    step: int
    skipped: int
    stopped_by: signal.Signals | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    setup: Setup
    ownership: Ownership
    log: Log
    progress: TrainingProgress
    stop: Agreement
    saver: Saver
    watch: Stopwatch
    profiler: Profiler
    evaluate: Evaluate | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StageEnd:
    state: TrainState
    stopped_by: signal.Signals | None


def train(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    evaluate: Evaluate | None = None,
    console: Console | None = None,
    cluster: Cluster = ALONE,
    profile: ProfiledSteps | None = None,
    mirrors: Sequence[EventSink] = (),
) -> Outcome:
    """Train through the stages of a recipe in the run folder `out`, or go on where an earlier process stopped.

    Args:
      recipe: what to do.
      out: a new or empty folder, or one that holds this same run.
      evaluate: measures the parameters on held-out batches; its numbers go to the metrics.
      console: where progress is shown; default: standard error.
      cluster: the processes of the run, all of which call this; process 0 alone shows and writes what is measured.
      profile: steps whose trace is put in the folder.
      mirrors: where scalars go besides the folder.

    Raises:
      UserError: bad data, a folder of another run, or one that another process trains in or that was moved or
        removed meanwhile, shapes that do not fit the devices, a process that was started otherwise, a source that
        vanished, no space on the disk for the last save, or too many skipped steps in a row. What was saved before
        stays.
    """
    console = console or progress_console()
    watch = Stopwatch()
    folder = check_folder(out, recipe)
    check_same(cluster, "configuration", {**to_dict(recipe), "out": str(folder.path)})
    with StopRequest() as request, contextlib.ExitStack() as closing:
        ownership = _owned(folder, recipe, closing) if cluster.index == 0 else NotOwner()
        for note in settings_without_effect(recipe):
            console.print(note)
        stop = Agreement(cluster, request)
        try:
            setup = stop.run(lambda: prepare(recipe, folder, console, cluster, watch))
        except Stopped as stopped:
            return Outcome(folder=folder, step=_newest_step(folder), skipped=0, stopped_by=stopped.signal)
        check_same(cluster, "data", identities(setup))
        saver = Saver(setup.store, cluster)
        if cluster.count == 1:  # of many processes the others may be gone where this one fails
            closing.push(_closed(setup.store, console))
        position = setup.position
        step = int(position.state.step)
        progress = closing.enter_context(TrainingProgress(console, total_steps=recipe.total_steps, step=step))
        log = closing.enter_context(open_log(folder.path, step, cluster, mirrors, warn=progress.warn))
        profiler = closing.enter_context(contextlib.closing(Profiler(folder.path / "profile", profile)))
        run = _Run(
            setup=setup,
            ownership=ownership,
            log=log,
            progress=progress,
            stop=stop,
            saver=saver,
            watch=watch,
            profiler=profiler,
            evaluate=evaluate,
        )
        end = _train_stage(run, position)
        while end.stopped_by is None and position.stage + 1 < len(recipe.stages):
            stage = position.stage + 1
            state = enter_stage(end.state, recipe, setup.models[stage], stage, setup.meshes[stage])
            position = Position(state=state, stage=stage, data_state=None)
            end = _train_stage(run, position)
        saver.finish()
        refused = saver.news()
        if refused is not None:
            progress.warn(f"NOT SAVED: {refused}; a later save succeeded")
        if int(end.state.step) > step:
            _sum_up(run)
    skipped = int(end.state.guard.skipped)
    return Outcome(folder=folder, step=int(end.state.step), skipped=skipped, stopped_by=end.stopped_by)


def _closed(store: CheckpointStore, console: Console) -> Callable[..., None]:
    """Returns what closes the store when a run ends. A save that fails then does not hide what ended the run."""

    def close(_: object, ended_by: BaseException | None, __: object) -> None:
        try:
            store.close()
        except SaveError as error:
            if ended_by is None:
                raise
            console.print(f"NOT SAVED: {error}", style="yellow", markup=False)

    return close


def _owned(folder: RunFolder, recipe: Recipe, closing: contextlib.ExitStack) -> Ownership:
    """Takes the folder until `closing` ends, and checks it again: another run may have written to it until now."""
    ownership = closing.enter_context(own(folder.path))
    check_folder(folder.path, recipe)
    return ownership


def _train_stage(run: _Run, position: Position) -> _StageEnd:
    """All remaining steps of one stage, each with the evaluation and the save that are due after it."""
    recipe, mesh = run.setup.recipe, run.setup.meshes[position.stage]
    stage = recipe.stages[position.stage]
    first = sum(earlier.steps for earlier in recipe.stages[: position.stage])
    last = first + stage.steps
    state, done = position.state, int(position.state.step)
    key = jax.device_get(state.key)
    held_out = _held_out(run, position.stage)
    model = run.setup.models[position.stage]
    programs = StagePrograms(recipe, model, stage, mesh, first_step=first)
    reporter = Reporter(recipe, stage, mesh, run.log, run.progress, run.watch)
    with contextlib.closing(_open_reader(run, position)) as reader:
        try:
            while True:
                # What is due comes before the next step, so that a run that was stopped in an evaluation makes it up.
                if first < done and _is_due(done, recipe.evaluation.every, last):
                    reporter.flush()
                    _evaluate(run, mesh, model, state, done, held_out)
                    reporter.restart_clock()
                if first < done and _is_due(done, recipe.checkpoint.every, last):
                    reporter.flush()
                    _save(run, stage, state, done, reader, permanent=done == last)
                if done == last:
                    return _StageEnd(state=state, stopped_by=None)
                run.ownership.check()
                failure = reader.read_ahead()
                run.watch.charge(Activity.STEP if reporter.waiting else Activity.INPUT)
                run.stop.check(failure)
                _complain(run, stage, done)
                loops = draw_loops(stage, key, done)
                if not programs.compiled(loops):
                    run.progress.say(f"compiling stage {stage.name} for {loops} loops")
                    run.stop.run(functools.partial(programs.compile, loops))
                    run.watch.charge(Activity.COMPILE)
                    reporter.restart_clock()
                run.profiler.before(done + 1)
                state, metrics = programs.run(loops, state, place(reader.take(), stage, mesh))
                done += 1
                reporter.add(done, loops, metrics)
                run.profiler.after(done, metrics)
                run.watch.charge(Activity.STEP)
        except Stopped as stopped:
            reporter.flush()
            _save(run, stage, state, done, reader, permanent=done == last)
            return _StageEnd(state=state, stopped_by=stopped.signal)
        except OutOfData as lost:
            reporter.flush()
            _save(run, stage, state, done, reader, permanent=done == last)
            run.saver.finish()
            raise UserError(
                f"{lost}; step {done} is saved; mend that, and the same command goes on from there"
            ) from None


def _open_reader(run: _Run, position: Position) -> Reader:
    """The stage's own stream of batches, at the place where the run stopped if it stopped inside this stage."""
    setup = run.setup
    stage, mesh = setup.recipe.stages[position.stage], setup.meshes[position.stage]
    lanes = data.lane_count(stage.batch_size, stage.sequence_length, position.data_state)
    part_rows = stage.batch_size // stage.accumulation

    def open_lane(lane: int) -> BatchIterator:
        return data.train_batches(
            setup.corpora[position.stage],
            setup.tokenizer,
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            seed=setup.recipe.data.seed + position.stage,
            process_index=lane,
            process_count=lanes,
        )

    def open_rows() -> data.LaneBatches:
        rows = process_rows(mesh, part_rows)
        return data.LaneBatches(open_lane, lanes=lanes, rows=rows, part_rows=part_rows, parts=stage.accumulation)

    return Reader(open_rows, run.progress.warn, start=position.data_state)


def _held_out(run: _Run, index: int) -> ValidationBatches | None:
    """What a stage is evaluated on, if anyone asked for it and anything is held out. Every process has all of it."""
    stage = run.setup.recipe.stages[index]
    if run.evaluate is None or run.setup.recipe.data.validation_fraction == 0:
        return None
    return data.validation_batches(
        run.setup.corpora[index],
        run.setup.tokenizer,
        batch_size=stage.batch_size // stage.accumulation,
        sequence_length=stage.sequence_length,
        max_sequences=run.setup.recipe.evaluation.sequences,
    )


def _evaluate(
    run: _Run, mesh: Mesh, model: LoopLM, state: TrainState, step: int, held_out: ValidationBatches | None
) -> None:
    evaluate = run.evaluate
    if evaluate is None or held_out is None or run.log.evaluated(step):
        return

    def measure(batches: ValidationBatches) -> Mapping[str, Any]:
        with use_mesh(mesh):
            return evaluate(model, state.params, batches)

    run.watch.charge(Activity.STEP)
    run.log.write(EVALUATION, step, run.stop.run_over(measure, held_out))
    run.watch.charge(Activity.EVALUATION)


def _save(run: _Run, stage: Stage, state: TrainState, step: int, reader: Reader, *, permanent: bool) -> None:
    metadata = Metadata(
        config=to_dict(run.setup.recipe),
        tokenizer_kind=run.setup.tokenizer.kind,
        tokenizer=run.setup.tokenizer.serialize(),
        tokenizer_fingerprint=run.setup.tokenizer.fingerprint,
        data_state=reader.state(),
        extra={"stage": stage.name},
    )
    run.watch.charge(Activity.STEP)
    run.ownership.check()
    run.log.flush()
    run.saver.save(step, state, metadata, permanent=permanent)
    run.watch.charge(Activity.SAVE)


def _complain(run: _Run, stage: Stage, step: int) -> None:
    """Say loudly that nothing was saved, where the training goes on all the same."""
    refused = run.saver.news()
    if refused is not None:
        run.progress.warn(f"{stage.name}  step {step}  NOT SAVED: {refused}; training goes on")


def _sum_up(run: _Run) -> None:
    """Where the time went, and where the profile lies."""
    run.watch.charge(Activity.OTHER)
    seconds = run.watch.total()
    run.progress.say(summary(seconds))
    for warning in warnings(seconds):
        run.progress.warn(f"warning: {warning}")
    how = run.profiler.how_to_open()
    if how is not None:
        run.progress.say(how)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _newest_step(folder: RunFolder) -> int:
    steps = CheckpointStore(folder.checkpoints, keep=1).steps()
    return steps[-1] if steps else 0
