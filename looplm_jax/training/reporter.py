"""Moves the metrics of a stage from the device to the log and the progress bar."""

import time
from typing import Any, cast

from jax.sharding import Mesh

from looplm_jax.config import Recipe, Stage
from looplm_jax.errors import UserError
from looplm_jax.training.flops import train_flops_per_token
from looplm_jax.training.goodput import Stopwatch
from looplm_jax.training.metrics import TRAIN, Log, as_values
from looplm_jax.training.progress import TrainingProgress
from looplm_jax.training.step import StepMetrics, is_logged
from looplm_jax.training.utilisation import memory_use, model_flop_utilisation, peak_flops


class Reporter:
    """Reports metrics one step late: those of step n are fetched while step n + 1 runs.

    Fetching them earlier would stall the devices between steps.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, mesh: Mesh, log: Log, progress: TrainingProgress, watch: Stopwatch
    ):
        self._recipe, self._stage = recipe, stage
        self._log, self._progress, self._watch = log, progress, watch
        self._peak = peak_flops(mesh)
        self._pending: tuple[int, int, StepMetrics] | None = None
        self.restart_clock()

    @property
    def waiting(self) -> bool:
        """Whether the devices are still computing the step that is not reported yet."""
        # `is_ready` does not block.
        return self._pending is not None and not cast(Any, self._pending[2].loss).is_ready()

    def add(self, step: int, loops: int, metrics: StepMetrics) -> None:
        """Reports the previous step and keeps `metrics` for the next call.

        Raises:
          UserError: the guard skipped too many consecutive steps, or the disk refuses the log.
        """
        self.flush()
        self._pending = (step, loops, metrics)

    def flush(self) -> None:
        """Reports the pending step. Raises the errors of `add`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(*pending)

    def restart_clock(self) -> None:
        """Excludes the time until now from the rate, because it was not spent training."""
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _report(self, step: int, loops: int, metrics: StepMetrics) -> None:
        """Writes the metrics of a step to the log and the progress bar."""
        values = as_values(metrics)
        self._clock_tokens += values["tokens"]
        # The rate is over all steps since the clock was restarted.
        rate = self._clock_tokens / max(time.monotonic() - self._clock, 1e-9)
        values["tokens_per_second"] = rate
        values["model_flops_per_second"] = rate * self._flops_per_token(loops)
        values |= model_flop_utilisation(values["model_flops_per_second"], self._peak)

        if is_logged(self._recipe, step):
            measured = {**values, **memory_use(), **self._watch.read_out()}
            self._log.write(TRAIN, step, {"stage": self._stage.name, "loops": loops, **measured})
            self.restart_clock()

        self._progress.update(self._stage.name, step, values)
        self._give_up_if_hopeless(int(metrics.skipped_in_a_row), step)

    def _flops_per_token(self, loops: int) -> int:
        """Returns the model FLOPs of one token in a train step."""
        return train_flops_per_token(
            self._recipe.model,
            loops=loops,
            sequence_length=self._stage.sequence_length,
            objective=self._stage.objective,
        )

    def _give_up_if_hopeless(self, skipped_in_a_row: int, step: int) -> None:
        """Raises UserError if the guard skipped `guard.patience` consecutive steps."""
        if skipped_in_a_row >= self._recipe.guard.patience:
            raise UserError(
                f"gave up at step {step}: {skipped_in_a_row} steps in a row had a loss or gradient that was not "
                "finite, or a spike; what was saved before stays; lower stage.learning_rate or look at the data, and "
                "train with another --out"
            )
