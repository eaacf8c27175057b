"""The batches of a stage, step by step: text, or answers that are generated with the parameters."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from looplm_jax.config import ModelConfig, Stage
from looplm_jax.data._packing import Batch
from looplm_jax.distributed import ProcessGroup
from looplm_jax.models._looplm import Params
from looplm_jax.training._batches import RetryingReader
from looplm_jax.training._compile import Columns, rollouts_to_device
from looplm_jax.training._goodput import Activity, ActivityTimer
from looplm_jax.training._local_params import local_params
from looplm_jax.training._metrics import Reporter
from looplm_jax.training._policy import CollectedRollouts, RolloutBatch
from looplm_jax.training._rollout_log import RolloutLog
from looplm_jax.training._setup import Setup
from looplm_jax.training._stopping import StopConsensus

Depths: TypeAlias = Int[np.ndarray, "B"]


@runtime_checkable
class Collector(Protocol):
    """Generates the answers of a stage. Each process answers a share of the problems of a step."""

    def generate(self, params: Params, step: int) -> list[Any]:
        """Returns this process's answers of a step, one JSON value for each of its problems.

        Args:
          params: the parameters before the step, on the devices of this process.
          step: the number of steps of the run before it.
        """

    def collect(self, answers: Sequence[Any], step: int) -> CollectedRollouts:
        """Returns the rollouts of a step from the answers of all processes, in the order of the problems."""


OpenCollector = Callable[[Setup, int, ProcessGroup], Collector]
"""Returns the collector of a stage, given its index and the processes of the run."""


@runtime_checkable
class Feed(Protocol):
    """The batches of a stage. Each is read ahead, prepared and taken, in this order.

    Attributes:
      columns: the columns of the prepared batch, for which a step is compiled.
      measured: what the host measured of it.
    """

    columns: Columns
    measured: Mapping[str, float]

    def read_ahead(self) -> str | None:
        """Reads the next batch while the devices compute. Returns None, or the reason if that fails."""

    def prepare(self, params: Params, step: int) -> None:
        """Makes the next batch, from the parameters before a step and the number of steps before it."""

    def next(self, depths: Depths) -> Batch[Array] | RolloutBatch:
        """Returns the batch on the devices, given the number of loops of each of its sequences."""

    def taken(self, step: int) -> None:
        """Called when the batch has become a step."""

    def flush(self) -> None:
        """Stores what was logged of the batches so far."""

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was taken."""

    def close(self) -> None:
        """Ends reading."""


class TextFeed:
    """Batches of text, from a reader, which `place` puts on the devices."""

    def __init__(self, reader: RetryingReader, place: Callable[[Batch[np.ndarray], Depths], Batch[Array]]):
        self.columns: Columns = None
        self.measured: Mapping[str, float] = {}
        self._reader, self._place = reader, place

    def read_ahead(self) -> str | None:
        """See `RetryingReader.read_ahead`."""
        return self._reader.read_ahead()

    def prepare(self, params: Params, step: int) -> None:
        """Does nothing: text does not depend on parameters."""

    def next(self, depths: Depths) -> Batch[Array]:
        """Returns the batch that was read ahead."""
        return self._place(self._reader.next(), depths)

    def taken(self, step: int) -> None:
        """Does nothing: text is not logged."""

    def flush(self) -> None:
        """Does nothing."""

    def state(self) -> dict[str, Any]:
        """Returns the position in the text."""
        return self._reader.state()

    def close(self) -> None:
        """Stops the threads of the reader."""
        self._reader.close()


class RolloutFeed:
    """Answers of the model to problems. They follow from the parameters and the step, so there is no position to save.

    Every process generates a share of the answers with a copy of the parameters on its own devices, and then receives
    those of the others.

    Args:
      collector: generates the answers of a step.
      stage: the stage.
      model: the model.
      mesh: the devices of the stage.
      group: the processes of the run.
      reporter: reports the previous step first, so that nothing is generated with parameters that are refused.
      stop: stops the generation when a signal arrives.
      watch: accounts for the time.
      log: keeps some of the answers; None in processes that do not write.
    """

    def __init__(
        self,
        collector: Collector,
        stage: Stage,
        model: ModelConfig,
        mesh: Mesh,
        *,
        group: ProcessGroup,
        reporter: Reporter,
        stop: StopConsensus,
        watch: ActivityTimer,
        log: RolloutLog | None,
    ):
        self.columns: Columns = None
        self.measured: Mapping[str, float] = {}
        self._collector, self._stage, self._model, self._mesh = collector, stage, model, mesh
        self._group, self._reporter, self._stop, self._watch, self._log = group, reporter, stop, watch, log
        self._rollouts: CollectedRollouts | None = None

    def read_ahead(self) -> str | None:
        """Reads nothing, which never fails."""
        return None

    def prepare(self, params: Params, step: int) -> None:
        """Generates the answers of a step."""
        self._reporter.flush()
        self._watch.charge(Activity.STEP)
        # Before the thread starts, because it all-gathers.
        own = local_params(params, self._model, self._mesh)
        # In a thread, so that a stop signal does not wait for the longest answer.
        answers = self._stop.run(lambda: self._collector.generate(own, step))
        self._rollouts = self._collector.collect(self._of_all_processes(answers), step)
        self._watch.charge(Activity.ROLLOUTS)
        self.columns, self.measured = self._rollouts.batch.columns, self._rollouts.metrics

    def _of_all_processes(self, answers: Sequence[Any]) -> list[Any]:
        """Returns the answers to the problems of process 0, then those of process 1, and so on.

        They are exchanged problem by problem, so that no message is large.
        """
        most = max(self._group.gather("problems", len(answers)))
        padded = [*answers, *[None] * (most - len(answers))]
        rounds = [self._group.gather("answers", answer) for answer in padded]
        return [answer for process in zip(*rounds, strict=True) for answer in process if answer is not None]

    def next(self, depths: Depths) -> RolloutBatch:
        """Returns the answers on the devices. Each of their tokens has the exit at which it was generated."""
        del depths
        assert self._rollouts is not None
        return rollouts_to_device(self._rollouts.batch, self._stage, self._mesh)

    def taken(self, step: int) -> None:
        """Logs some of the answers."""
        assert self._rollouts is not None
        if self._log is not None:
            self._log.write(step, self._rollouts.lines)

    def flush(self) -> None:
        """Stores the logged answers."""
        if self._log is not None:
            self._log.flush()

    def state(self) -> dict[str, Any]:
        """Returns an empty position."""
        return {}

    def close(self) -> None:
        """Does nothing."""
