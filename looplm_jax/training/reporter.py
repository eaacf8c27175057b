"""Metrics of a stage on their way from the device to the log and the progress bar."""

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
    """Reports one step late: the metrics of step n are fetched while step n + 1 runs."""

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
        """Whether the devices are still at the step that is kept."""
        return self._pending is not None and not cast(Any, self._pending[2].loss).is_ready()

    def add(self, step: int, loops: int, metrics: StepMetrics) -> None:
        """Report the step before, and keep this one.

        Raises:
          UserError: the guard skipped too many steps in a row, or the disk refuses.
        """
        self.flush()
        self._pending = (step, loops, metrics)

    def flush(self) -> None:
        """Report the step that is kept. Raises what `add` raises."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(*pending)

    def restart_clock(self) -> None:
        """Leave out of the rate what was not training."""
        self._clock, self._clock_tokens = time.monotonic(), 0

    def _report(self, step: int, loops: int, metrics: StepMetrics) -> None:
        values = as_values(metrics)
        self._clock_tokens += values["tokens"]
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
        return train_flops_per_token(
            self._recipe.model,
            loops=loops,
            sequence_length=self._stage.sequence_length,
            objective=self._stage.objective,
        )

    def _give_up_if_hopeless(self, skipped_in_a_row: int, step: int) -> None:
        if skipped_in_a_row >= self._recipe.guard.patience:
            raise UserError(
                f"gave up at step {step}: {skipped_in_a_row} steps in a row had a loss or gradient that was not "
                "finite, or a spike; what was saved before stays; lower stage.learning_rate or look at the data, and "
                "train with another --out"
            )
