"""A training run, from a recipe to its last checkpoint: the story that `looplm train` tells.

A run is a folder. Started again with the same recipe it goes on from its newest good checkpoint, bit for bit as if
it had never stopped: parameters, optimiser, guard, random key, place in the data and metrics.
"""

import dataclasses
import functools
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from looplm_jax import data
from looplm_jax.checkpoints import CheckpointStore, Metadata, check_same_run
from looplm_jax.codec import to_dict
from looplm_jax.config import Objective, Recipe, Stage
from looplm_jax.data.corpus import Corpus, open_corpus
from looplm_jax.data.iterator import BatchIterator
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.models.looplm import LoopLM, Params
from looplm_jax.sharding import check_batch, check_divides, make_mesh
from looplm_jax.training.flops import train_flops_per_token
from looplm_jax.training.metrics import MetricsLog, as_values
from looplm_jax.training.program import StagePrograms, draw_loops, place
from looplm_jax.training.progress import TrainingProgress
from looplm_jax.training.run_folder import RunFolder, open_run
from looplm_jax.training.signals import Stopped, StopRequest
from looplm_jax.training.state import TrainState, abstract_state, enter_stage, initial_state
from looplm_jax.training.step import StepMetrics
from looplm_jax.training.tokenizer import run_tokenizer

Evaluate = Callable[[LoopLM, Params, "data.ValidationBatches"], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: at which step, by which signal if it was stopped, and how many steps the guard skipped."""

    folder: RunFolder
    step: int
    skipped: int
    stopped_by: signal.Signals | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What stays the same from the first step to the last."""

    recipe: Recipe
    folder: RunFolder
    model: LoopLM
    mesh: Mesh
    corpus: Corpus
    tokenizer: Tokenizer
    store: CheckpointStore
    log: MetricsLog
    stop: StopRequest
    progress: TrainingProgress
    evaluate: Evaluate | None


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
      many skipped
        steps in a row. What was saved before stays.
    """
    console = console or Console(stderr=True)
    with StopRequest() as stop:
        # 1. Refuse what cannot work before anything is written.
        mesh = make_mesh(recipe.mesh)
        _check_shapes(recipe, mesh)
        corpus = open_corpus(recipe.data)
        # 2. The folder, the tokeniser, and the newest good state of this run if there is one.
        folder = open_run(out, recipe)
        tokenizer = run_tokenizer(recipe, corpus, folder, console)
        model = LoopLM(recipe.model, recipe.compute)
        store = CheckpointStore(folder.checkpoints, keep=recipe.checkpoint.keep)
        state, index, data_state = _restore_or_start(recipe, folder, model, mesh, store, tokenizer, console)
        step = int(state.step)
        # 3. Stage after stage.
        log = MetricsLog(folder.path, step=step)
        progress = TrainingProgress(console, total_steps=recipe.total_steps, step=step)
        run = _Run(
            recipe=recipe, folder=folder, model=model, mesh=mesh, corpus=corpus, tokenizer=tokenizer, store=store,
            log=log, stop=stop, progress=progress, evaluate=evaluate,
        )  # fmt: skip
        stopped_by = None
        try:
            with progress:
                for position in range(index, len(recipe.stages)):
                    state = _train_stage(run, position, state, data_state if position == index else None)
        except _StoppedAt as stopped:
            state, stopped_by = stopped.state, stopped.signal
        finally:
            log.close()
            store.close()
    return Outcome(folder=folder, step=int(state.step), skipped=int(state.guard.skipped), stopped_by=stopped_by)


class _StoppedAt(Exception):
    """A signal stopped a stage; its state has been saved."""

    def __init__(self, state: TrainState, number: signal.Signals):
        super().__init__(number.name)
        self.state, self.signal = state, number


def _train_stage(run: _Run, index: int, state: TrainState, data_state: Mapping[str, Any] | None) -> TrainState:
    """All remaining steps of one stage, its evaluation and its last save."""
    stage, (first, last) = run.recipe.stages[index], _bounds(run.recipe, index)
    if index > 0 and data_state is None:
        state = enter_stage(state, run.recipe, run.model, index, run.mesh)
    batches = _open_batches(run, index, data_state)
    held_out = _held_out(run, stage)
    programs = StagePrograms(run.recipe, run.model, stage, run.mesh, first_step=first)
    reporter = _Reporter(run, stage, step=int(state.step))
    done = int(state.step)
    try:
        while done < last:
            run.stop.check()
            loops = draw_loops(stage, state.key, done)
            if not programs.compiled(loops):
                run.progress.say(f"compiling stage {stage.name} for {loops} loops")
                run.stop.run(functools.partial(programs.compile, loops))
                reporter.restart_clock()
            state, metrics = programs.run(loops, state, place(next(batches), stage, run.mesh))
            reporter.add(done + 1, loops, metrics)
            done += 1
            at_end = done == last
            if _is_due(done, run.recipe.evaluation.every) or at_end:
                reporter.flush()
                _evaluate(run, state, done, held_out)
                reporter.restart_clock()
            if _is_due(done, run.recipe.checkpoint.every) or at_end:
                reporter.flush()
                _save(run, stage, state, done, batches, permanent=at_end)
    except Stopped as stopped:
        reporter.flush()
        _save(run, stage, state, done, batches, permanent=False)
        raise _StoppedAt(state, stopped.signal) from None
    finally:
        batches.close()
    return state


class _Reporter:
    """Metrics, one step late: those of step n are fetched while step n + 1 runs."""

    def __init__(self, run: _Run, stage: Stage, *, step: int):
        self._run, self._stage = run, stage
        self._pending: tuple[int, int, StepMetrics] | None = None
        self._clock_step = step
        self.restart_clock()

    def add(self, step: int, loops: int, metrics: StepMetrics) -> None:
        """Report the step before, and keep this one."""
        pending, self._pending = self._pending, (step, loops, metrics)
        self._report(pending)

    def flush(self) -> None:
        """Report the step that is kept."""
        pending, self._pending = self._pending, None
        self._report(pending)

    def restart_clock(self) -> None:
        """Leave out of the rate what was not training."""
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _report(self, pending: tuple[int, int, StepMetrics] | None) -> None:
        if pending is None:
            return
        step, loops, metrics = pending
        values = as_values(metrics)
        self._clock_tokens += values["tokens"]
        rate = self._clock_tokens / max(time.monotonic() - self._clock, 1e-9)
        values["tokens_per_second"] = rate
        values["model_flops_per_second"] = rate * self._flops_per_token(loops)
        if _is_due(step, self._run.recipe.log_every) or step == self._run.recipe.total_steps:
            self._run.log.write("train", step, {"stage": self._stage.name, "loops": loops, **values})
            self.restart_clock()
        self._run.progress.update(self._stage.name, step, values)
        self._give_up_if_hopeless(int(metrics.skipped_in_a_row), step)

    def _flops_per_token(self, loops: int) -> int:
        gate_only = self._stage.objective is Objective.GATE
        length = self._stage.sequence_length
        return train_flops_per_token(self._run.recipe.model, loops=loops, sequence_length=length, gate_only=gate_only)

    def _give_up_if_hopeless(self, skipped_in_a_row: int, step: int) -> None:
        if skipped_in_a_row >= self._run.recipe.guard.patience:
            raise UserError(
                f"gave up at step {step}: {skipped_in_a_row} steps in a row had a loss or gradient that was not "
                f"finite, or a spike; lower stage.learning_rate or look at the data, then go on from "
                f"{self._run.folder.path}"
            )


def _restore_or_start(
    recipe: Recipe,
    folder: RunFolder,
    model: LoopLM,
    mesh: Mesh,
    store: CheckpointStore,
    tokenizer: Tokenizer,
    console: Console,
) -> tuple[TrainState, int, Mapping[str, Any] | None]:
    """The state to go on with, the stage it belongs to, and the place in that stage's data if it is in the middle."""
    if not store.steps():
        return initial_state(recipe, model, recipe.stages[0], mesh), 0, None
    names = [stage.name for stage in recipe.stages]

    def wanted(metadata: Metadata) -> TrainState:
        fingerprint = {"tokenizer": tokenizer.fingerprint}
        saved = {**metadata.config, "tokenizer": metadata.tokenizer_fingerprint}
        check_same_run(str(folder.path), saved, {**to_dict(recipe), **fingerprint})
        return abstract_state(recipe, model, recipe.stages[names.index(metadata.extra["stage"])], mesh)

    restored = store.restore(wanted)
    for damaged in restored.damaged:
        console.print(f"[yellow]warning:[/] {damaged}; going back to step {restored.step}", highlight=False)
    index = names.index(restored.metadata.extra["stage"])
    console.print(f"going on from step {restored.step} of stage {names[index]}", highlight=False)
    if restored.step < _bounds(recipe, index)[1] or index + 1 == len(names):
        return restored.state, index, restored.metadata.data_state
    return restored.state, index + 1, None


def _open_batches(run: _Run, index: int, data_state: Mapping[str, Any] | None) -> BatchIterator:
    """The stage's own stream of batches, at the place where the run stopped if it stopped inside this stage."""
    stage = run.recipe.stages[index]
    batches = data.train_batches(
        run.corpus,
        run.tokenizer,
        batch_size=stage.batch_size,
        sequence_length=stage.sequence_length,
        seed=run.recipe.data.seed + index,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    if data_state is not None:
        batches.restore(data_state)
    return batches


def _held_out(run: _Run, stage: Stage) -> "data.ValidationBatches | None":
    if run.evaluate is None or run.recipe.data.validation_fraction == 0:
        return None
    return data.validation_batches(
        run.corpus,
        run.tokenizer,
        batch_size=stage.batch_size // stage.accumulation,
        sequence_length=stage.sequence_length,
        max_sequences=run.recipe.evaluation.sequences,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def _evaluate(run: _Run, state: TrainState, step: int, held_out: "data.ValidationBatches | None") -> None:
    if run.evaluate is None or held_out is None:
        return
    evaluate = run.evaluate
    values = run.stop.run(lambda: evaluate(run.model, state.params, held_out))
    run.log.write("evaluation", step, values)


def _save(run: _Run, stage: Stage, state: TrainState, step: int, batches: BatchIterator, *, permanent: bool) -> None:
    metadata = Metadata(
        config=to_dict(run.recipe),
        tokenizer_kind=run.tokenizer.kind,
        tokenizer=run.tokenizer.serialize(),
        tokenizer_fingerprint=run.tokenizer.fingerprint,
        data_state=batches.state(),
        extra={"stage": stage.name},
    )
    run.store.save(step, state, metadata, permanent=permanent)


def _bounds(recipe: Recipe, index: int) -> tuple[int, int]:
    """The run's step count before the first and after the last step of a stage."""
    first = sum(stage.steps for stage in recipe.stages[:index])
    return first, first + recipe.stages[index].steps


def _check_shapes(recipe: Recipe, mesh: Mesh) -> None:
    check_divides(mesh, recipe.model)
    for stage in recipe.stages:
        check_batch(mesh, stage.batch_size, stage.accumulation, f"stages.{stage.name}")


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
