"""A training run, from a recipe to its last checkpoint: the story that `looplm train` tells.

A run is a folder. Started again with the same recipe it goes on from its newest good checkpoint, bit for bit as if
it had never stopped: parameters, optimiser, guard, random key, place in the data and metrics.
"""

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

import jax
from rich.console import Console

from looplm_jax import data
from looplm_jax.checkpoints import CheckpointStore, Metadata
from looplm_jax.codec import to_dict
from looplm_jax.config import Recipe, Stage
from looplm_jax.data import ValidationBatches
from looplm_jax.data.iterator import BatchIterator
from looplm_jax.models.looplm import LoopLM, Params
from looplm_jax.training.metrics import EVALUATION, MetricsLog
from looplm_jax.training.program import StagePrograms, draw_loops, place
from looplm_jax.training.progress import TrainingProgress, progress_console
from looplm_jax.training.reporter import Reporter
from looplm_jax.training.run_folder import RunFolder, check_folder
from looplm_jax.training.setup import Position, Setup, prepare
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
    log: MetricsLog
    progress: TrainingProgress
    stop: StopRequest
    evaluate: Evaluate | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StageEnd:
    state: TrainState
    stopped_by: signal.Signals | None


def train(
    recipe: Recipe, out: str | os.PathLike[str], *, evaluate: Evaluate | None = None, console: Console | None = None
) -> Outcome:
    """Train through the stages of a recipe in the run folder `out`, or go on where an earlier process stopped.

    Args:
      recipe: what to do.
      out: a new or empty folder, or one that holds this same run.
      evaluate: measures the parameters on held-out batches; its numbers go to the metrics.
      console: where progress is shown; default: standard error.

    Raises:
      UserError: bad data, a folder of another run, shapes that do not fit the devices, no space on the disk, or too
        many skipped steps in a row. What was saved before stays.
    """
    console = console or progress_console()
    folder = check_folder(out, recipe)
    with StopRequest() as stop, contextlib.ExitStack() as closing:
        try:
            setup = stop.run(lambda: prepare(recipe, folder, console))
        except Stopped as stopped:
            return Outcome(folder=folder, step=_newest_step(folder), skipped=0, stopped_by=stopped.signal)
        closing.callback(setup.store.close)
        position = setup.position
        step = int(position.state.step)
        log = MetricsLog(folder.path, step=step)
        closing.callback(log.close)
        progress = closing.enter_context(TrainingProgress(console, total_steps=recipe.total_steps, step=step))
        run = _Run(setup=setup, log=log, progress=progress, stop=stop, evaluate=evaluate)
        end = _train_stage(run, position)
        while end.stopped_by is None and position.stage + 1 < len(recipe.stages):
            state = enter_stage(end.state, recipe, setup.models[position.stage + 1], position.stage + 1, setup.mesh)
            position = Position(state=state, stage=position.stage + 1, data_state=None)
            end = _train_stage(run, position)
    skipped = int(end.state.guard.skipped)
    return Outcome(folder=folder, step=int(end.state.step), skipped=skipped, stopped_by=end.stopped_by)


def _train_stage(run: _Run, position: Position) -> _StageEnd:
    """All remaining steps of one stage, each with the evaluation and the save that are due after it."""
    recipe, mesh = run.setup.recipe, run.setup.mesh
    stage = recipe.stages[position.stage]
    first = sum(earlier.steps for earlier in recipe.stages[: position.stage])
    last = first + stage.steps
    state, done = position.state, int(position.state.step)
    key = jax.device_get(state.key)
    held_out = _held_out(run, position.stage)
    model = run.setup.models[position.stage]
    programs = StagePrograms(recipe, model, stage, mesh, first_step=first)
    reporter = Reporter(recipe, stage, run.log, run.progress)
    with contextlib.closing(_open_batches(run.setup, position)) as batches:
        try:
            while True:
                # What is due comes before the next step, so that a run that was stopped in an evaluation makes it up.
                if first < done and _is_due(done, recipe.evaluation.every, last):
                    reporter.flush()
                    _evaluate(run, model, state, done, held_out)
                    reporter.restart_clock()
                if first < done and _is_due(done, recipe.checkpoint.every, last):
                    reporter.flush()
                    _save(run.setup, stage, state, done, batches, permanent=done == last)
                if done == last:
                    return _StageEnd(state=state, stopped_by=None)
                run.stop.check()
                loops = draw_loops(stage, key, done)
                if not programs.compiled(loops):
                    run.progress.say(f"compiling stage {stage.name} for {loops} loops")
                    run.stop.run(functools.partial(programs.compile, loops))
                    reporter.restart_clock()
                state, metrics = programs.run(loops, state, place(next(batches), stage, mesh))
                done += 1
                reporter.add(done, loops, metrics)
        except Stopped as stopped:
            reporter.flush()
            _save(run.setup, stage, state, done, batches, permanent=done == last)
            return _StageEnd(state=state, stopped_by=stopped.signal)


def _open_batches(setup: Setup, position: Position) -> BatchIterator:
    """The stage's own stream of batches, at the place where the run stopped if it stopped inside this stage."""
    stage = setup.recipe.stages[position.stage]
    batches = data.train_batches(
        setup.corpora[position.stage],
        setup.tokenizer,
        batch_size=stage.batch_size,
        sequence_length=stage.sequence_length,
        seed=setup.recipe.data.seed + position.stage,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if position.data_state is not None:
        batches.restore(position.data_state)
    return batches


def _held_out(run: _Run, index: int) -> ValidationBatches | None:
    """What a stage is evaluated on, if anyone asked for it and anything is held out."""
    stage = run.setup.recipe.stages[index]
    if run.evaluate is None or run.setup.recipe.data.validation_fraction == 0:
        return None
    return data.validation_batches(
        run.setup.corpora[index],
        run.setup.tokenizer,
        batch_size=stage.batch_size // stage.accumulation,
        sequence_length=stage.sequence_length,
        max_sequences=run.setup.recipe.evaluation.sequences,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _evaluate(run: _Run, model: LoopLM, state: TrainState, step: int, held_out: ValidationBatches | None) -> None:
    evaluate = run.evaluate
    if evaluate is None or held_out is None or run.log.evaluated(step):
        return
    values = run.stop.run(lambda: evaluate(model, state.params, held_out))
    run.log.write(EVALUATION, step, values)


def _save(setup: Setup, stage: Stage, state: TrainState, step: int, batches: BatchIterator, *, permanent: bool) -> None:
    metadata = Metadata(
        config=to_dict(setup.recipe),
        tokenizer_kind=setup.tokenizer.kind,
        tokenizer=setup.tokenizer.serialize(),
        tokenizer_fingerprint=setup.tokenizer.fingerprint,
        data_state=batches.state(),
        extra={"stage": stage.name},
    )
    setup.store.save(step, state, metadata, permanent=permanent)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _newest_step(folder: RunFolder) -> int:
    steps = CheckpointStore(folder.checkpoints, keep=1).steps()
    return steps[-1] if steps else 0
