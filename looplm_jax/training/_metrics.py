"""The metrics of a run: from the devices to `metrics.jsonl`, TensorBoard and the progress bar.

Refused writes never end a run.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from looplm_jax import json_io
from looplm_jax.config import Recipe, Stage
from looplm_jax.distributed import ProcessGroup
from looplm_jax.errors import UserError
from looplm_jax.files import AnyPath, check_regular, report_failed_reads
from looplm_jax.losses import LoopRPTMetrics, Stage1Metrics
from looplm_jax.training._goodput import (
    ActivityTimer,
    memory_use,
    model_flops_utilization,
    peak_flops,
    train_flops_per_token,
)
from looplm_jax.training._gradients import PolicyMetrics
from looplm_jax.training._loggers import EventSink, open_append_only, open_events
from looplm_jax.training._progress import TrainingProgress
from looplm_jax.training._step import StepMetrics, is_logged

M = TypeVar("M")

TRAIN = "train"
"""The kind of the lines of `metrics.jsonl` about steps."""

EVALUATION = "evaluation"
"""The kind of the lines of `metrics.jsonl` about evaluations during training."""


# Writing


@runtime_checkable
class Log(Protocol):
    """The destination of the metrics of a run."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line."""

    def flush(self) -> None:
        """Stores all lines written so far. Must be called before a save.

        A run that resumes from that checkpoint needs the lines up to it.
        """

    def evaluated(self, step: int) -> bool:
        """Whether an earlier process has written the evaluation at this step."""


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/`, and sends the same scalars to `mirrors`.

    Lines after `step` are removed on opening, because the resumed run writes them again. Damaged lines are dropped with
    a warning. Lines that the disk or the bucket refuses later are kept in memory, with a warning, and retried with the
    next line.

    Args:
      folder: the run folder.
      step: the step from which the run continues.
      mirrors: additional destinations of scalars.
      warn: receives each warning.

    Raises:
      UserError: the disk or the bucket refuses the file already on opening.
    """

    def __init__(
        self,
        folder: AnyPath,
        *,
        step: int,
        mirrors: Sequence[EventSink] = (),
        warn: Callable[[str], None] = lambda _: None,
    ):
        kept = [row for row in read_metrics(folder, warn=warn) if row["step"] <= step]
        self._evaluated = {row["step"] for row in kept if row["kind"] == EVALUATION}

        self._path = folder / "metrics.jsonl"
        # The file is rewritten without damaged lines and without the lines after `step`.
        self._lines = open_append_only(self._path, "".join(map(_line, kept)).encode())
        self._events = open_events(folder / "tensorboard", step=step)

        self._mirrors, self._warn = mirrors, warn
        self._refused: str | None = None

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line, `{"kind": kind, "step": step, **values}`, with null for values that are not finite.

        Each list becomes one TensorBoard scalar per loop. There, NaN stays NaN.
        """
        self._lines.write(_line({"kind": kind, "step": step, **values}).encode())
        self._events.write(step, _scalars(kind, values))

        # Reported after both writes, so that a full disk is one warning and not two.
        self._report_refusal("kept in memory, and retried with the next line; training continues")

        # Mirrors get the scalars even if the disk refuses them.
        for mirror in self._mirrors:
            mirror.write(step, _scalars(kind, values))

    def flush(self) -> None:
        """Stores all lines written so far; see `Log.flush`."""
        self._lines.flush()
        self._events.file.flush()
        self._report_refusal("kept in memory, and retried; training continues")

    @property
    def evaluations(self) -> list[int]:
        """The steps at which earlier processes have written an evaluation, in ascending order."""
        return sorted(self._evaluated)

    def evaluated(self, step: int) -> bool:
        """Whether an earlier process has written the evaluation at this step."""
        return step in self._evaluated

    def close(self) -> None:
        """Closes the files. Lines that are still refused are lost."""
        self._lines.close()
        self._events.file.close()
        # Makes `_report_refusal` report a refusal again, now with its final consequence.
        self._refused = None
        self._report_refusal("the last lines are lost; fix that before the next run")
        for mirror in self._mirrors:
            mirror.close()

    def _report_refusal(self, consequence: str) -> None:
        """Warns when writes begin to be refused, and when they succeed again."""
        refused = self._lines.refused or self._events.file.refused
        if refused is not None and self._refused is None:
            self._warn(f"NOT WRITTEN: {self._path} ({refused}): {consequence}")
        elif refused is None and self._refused is not None:
            self._warn(f"{self._path} is written again; nothing is missing")
        self._refused = refused


class _Unwritten:
    """The log of the processes other than process 0: it writes nothing, but has the steps of earlier evaluations."""

    def __init__(self, evaluations: Sequence[int]):
        self._evaluations = frozenset(evaluations)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        del kind, step, values

    def flush(self) -> None:
        pass

    def evaluated(self, step: int) -> bool:
        return step in self._evaluations


@contextlib.contextmanager
def open_log(
    folder: AnyPath, step: int, group: ProcessGroup, mirrors: Sequence[EventSink] = (), *, warn: Callable[[str], None]
) -> Iterator[Log]:
    """A context manager that yields the log of a run at a step. All processes must call this together.

    Only process 0 writes the files. Arguments as for `MetricsLog`.
    """
    log = MetricsLog(folder, step=step, mirrors=mirrors, warn=warn) if group.index == 0 else None

    # Whether an evaluation is due must be the same on all processes.
    evaluations = group.gather("evaluations", log.evaluations if log else [])[0]
    if log is None:
        yield _Unwritten(evaluations)
        return

    with contextlib.closing(log):
        yield log


# Reading


def _warn_on_stderr(line: str) -> None:
    print(f"looplm: {line}", file=sys.stderr)


def read_metrics(folder: AnyPath, *, warn: Callable[[str], None] = _warn_on_stderr) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl` as dictionaries, or none if there is no file.

    An incomplete last line, left by a killed process, is dropped silently. Damaged lines are dropped with one call of
    `warn`.

    Raises:
      UserError: the disk or the bucket refuses the read.
    """
    path = folder / "metrics.jsonl"
    with report_failed_reads(path):
        if not path.exists():
            return []
        check_regular(path)
        # A killed process may have left anything, so the file is read as bytes: damaged text would raise.
        lines = path.read_bytes().split(b"\n")

    rows = [json_io.metrics_row(line) for line in lines[:-1]]  # text after the last newline is incomplete
    damaged = [number for number, row in enumerate(rows, start=1) if row is None]
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        warn(f"warning: {path}:{damaged[0]}{more}: not a line of metrics; left out")

    return [row for row in rows if row is not None]


# Values


def as_values(metrics: StepMetrics) -> dict[str, Any]:
    """Returns the metrics of a step as plain numbers and lists, fetched from the device.

    For a step without unmasked tokens, means over tokens are NaN.
    """
    # One transfer for all arrays.
    host = jax.device_get(metrics)
    tokens = int(host.tokens)
    learned = tokens if host.looprpt is None else int(host.looprpt.hard_tokens)
    loss, exits, means = host.loss, host.exits, host.means
    # A mean over zero tokens is undefined.
    if learned == 0:
        loss = _undefined(loss)
    if tokens == 0:
        exits, means = _undefined((exits, means))

    return {
        "loss": float(loss),
        **({} if exits is None else _exit_values(exits)),
        "gradient_norm": float(host.gradient_norm),
        "learning_rate": float(host.learning_rate),
        "tokens": tokens,
        "skipped": int(host.skipped),
        **{name: float(mean) for name, mean in means.items()},
        **({} if host.looprpt is None else _looprpt_values(host.looprpt, tokens)),
        **({} if host.policy is None else _policy_values(host.policy)),
    }


def _exit_values(exits: Stage1Metrics) -> dict[str, Any]:
    """Returns the losses per loop and the statistics of exits as plain numbers and lists."""
    return {
        "expected_loss": float(exits.expected_loss),
        "loss_per_loop": _floats(exits.loss_per_loop),
        "exit_pdf": _floats(exits.exit_pdf),
        "mean_exit_loop": float(exits.mean_exit_loop),
        "exit_entropy": float(exits.exit_entropy),
    }


def _policy_values(metrics: PolicyMetrics) -> dict[str, float]:
    """Returns the metrics of a policy gradient as plain numbers."""
    return {
        "policy_loss": float(metrics.loss),
        "kl": float(metrics.kl),
        "clipped": float(metrics.clipped),
        "rollout_gap": float(np.max(metrics.gaps)),
    }


def _looprpt_values(metrics: LoopRPTMetrics, tokens: int) -> dict[str, float]:
    """Returns the metrics of LoopRPT as plain numbers. Means over zero hard tokens are NaN."""
    hard = float(metrics.hard_tokens)
    means = metrics if hard else _undefined(metrics)
    return {
        "reward": float(means.reward),
        "rollout_exit_loop": float(means.exit_loop),
        "reference_loop": float(means.reference_loop),
        "hard_share": hard / tokens if tokens else math.nan,
        "policy_loss": float(means.policy_loss),
        "representation_loss": float(means.representation_loss),
        "rollout_kl": float(means.kl),
        "hard_exit_entropy": float(means.exit_entropy),
    }


def _undefined(means: M) -> M:
    """Returns NaN in place of every number."""
    return jax.tree.map(lambda mean: np.full_like(mean, math.nan), means)


def _line(row: Mapping[str, Any]) -> str:
    """Returns a row of metrics as one line of JSON."""
    return json_io.dumps(row) + "\n"


def _scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a line as TensorBoard scalars."""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            scalars |= {f"{kind}/{name}/{loop}": float(part) for loop, part in enumerate(value, start=1)}
        elif isinstance(value, int | float):
            # Text, such as the name of the stage, is not a scalar.
            scalars[f"{kind}/{name}"] = float(value)
    return scalars


def _floats(values: Any) -> list[float]:
    return [float(value) for value in values]


# Reporting


class Reporter:
    """Reports metrics one step late: those of step n are fetched while step n + 1 runs.

    Fetching them earlier would stall the devices between steps.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, mesh: Mesh, log: Log, progress: TrainingProgress, watch: ActivityTimer
    ):
        self._recipe, self._stage = recipe, stage
        self._log, self._progress, self._watch = log, progress, watch
        self._peak = peak_flops(mesh)
        self._pending: tuple[int, int | float, StepMetrics, Mapping[str, float]] | None = None
        self.restart_clock()

    @property
    def waiting(self) -> bool:
        """Whether the devices are still computing the step that is not reported yet."""
        # `is_ready` does not block.
        return self._pending is not None and not cast(Any, self._pending[2].loss).is_ready()

    def add(
        self, step: int, loops: int | float, metrics: StepMetrics, measured: Mapping[str, float] | None = None
    ) -> None:
        """Reports the previous step and keeps `metrics`, and what the host has `measured`, for the next call.

        `loops` is the number of loops of the step, or its mean over sequences.

        Raises:
          UserError: the guard skipped too many consecutive steps, the disk refuses the log, or a replay does not
            reproduce its rollouts.
        """
        self.flush()
        self._pending = (step, loops, metrics, measured or {})

    def flush(self) -> None:
        """Reports the pending step. Raises the errors of `add`."""
        # Cleared first: an error in the report must not make a later flush report the step again.
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(*pending)

    def restart_clock(self) -> None:
        """Excludes the time until now from the rate, because it was not spent training."""
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _report(self, step: int, loops: int | float, metrics: StepMetrics, measured: Mapping[str, float]) -> None:
        """Writes the metrics of a step to the log and the progress bar."""
        values = {**as_values(metrics), **measured}
        # A solver finds the number of loops.
        loops = values.get("solver_loops", loops)
        # Masked tokens are not counted: they are computed, but nothing is learned from them.
        self._clock_tokens += values["tokens"]
        # The rate is over all steps since the clock was restarted.
        rate = self._clock_tokens / max(time.monotonic() - self._clock, 1e-9)
        values["tokens_per_second"] = rate
        values["model_flops_per_second"] = rate * self._flops_per_token(loops)
        values |= model_flops_utilization(values["model_flops_per_second"], self._peak)

        if is_logged(self._recipe, step):
            measured = {**values, **memory_use(), **self._watch.read_out()}
            self._log.write(TRAIN, step, {"stage": self._stage.name, "loops": loops, **measured})
            self.restart_clock()

        # The guard comes last, so that the metrics of the step that ends the run are written.
        self._progress.update(self._stage.name, step, values)
        self._check_patience(int(metrics.skipped_in_a_row), step)
        if "rollout_gap" in values:
            self._check_gap(values["rollout_gap"], step)

    def _check_gap(self, gap: float, step: int) -> None:
        """Raises UserError if the replay of a step does not reproduce its rollouts, which are then another policy's."""
        tolerance = self._stage.policy.gap_tolerance
        if not gap <= tolerance:
            raise UserError(
                f"step {step}: log-probabilities of rollout and replay differ by {gap:.2g} nats, more than "
                f"stages.{self._stage.name}.policy.gap_tolerance={tolerance:g}; compute in float32, or allow more"
            )

    def _flops_per_token(self, loops: int | float) -> int:
        """Returns the model FLOPs of one token in a train step."""
        return train_flops_per_token(
            self._recipe.model,
            loops=loops,
            sequence_length=self._stage.sequence_length,
            objective=self._stage.objective,
            read_out=self._stage.read_out,
            backprop_loops=self._stage.backward_loops,
            short_loops=self._stage.mean_short_loops,
            rollouts=self._stage.looprpt.rollouts,
        )

    def _check_patience(self, skipped_in_a_row: int, step: int) -> None:
        """Raises UserError if the guard skipped `guard.patience` consecutive steps."""
        if skipped_in_a_row >= self._recipe.guard.patience:
            raise UserError(
                f"gave up at step {step}: {skipped_in_a_row} steps in a row had a loss or gradient that was not "
                "finite, or a spike; what was saved before stays; lower stage.learning_rate or look at the data, and "
                "train with another --out"
            )
