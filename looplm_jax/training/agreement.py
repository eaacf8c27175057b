"""Agreement on stopping: all processes of a run stop at the same step, for a signal or because data is missing."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

from looplm_jax.data import ValidationBatches
from looplm_jax.data.packing import Batch
from looplm_jax.distributed import Cluster
from looplm_jax.errors import UserError
from looplm_jax.training.signals import Job, Stopped, StopRequest

R = TypeVar("R")

_POLL_SECONDS = 0.1


class OutOfData(UserError):
    """A process could not read its part of the next batch. The message names the process and the reason."""


class Agreement:
    """Extends `StopRequest` from one process to all processes of a run.

    The processes communicate over the network while the devices still compute the previous step, so the devices do not
    wait. All processes must call each method at the same point.

    Args:
      cluster: the processes of the run.
      request: the stop request of this process.
    """

    def __init__(self, cluster: Cluster, request: StopRequest):
        self._cluster, self._request = cluster, request

    def check(self, failure: str | None = None) -> None:
        """Returns if all processes can continue, and raises the same error on all of them otherwise.

        Args:
          failure: why this process cannot continue, or None.

        Raises:
          Stopped: one of the processes received a signal.
          OutOfData: one of them has a `failure`.
        """
        said = self._cluster.gather("step", [self._request.received, failure])
        # Missing data takes precedence over a signal, so that its reason is reported.
        failures = [(index, why) for index, (_, why) in enumerate(said) if why is not None]

        if failures:
            index, why = failures[0]
            raise OutOfData(why if self._cluster.count == 1 else f"process {index}: {why}")

        _raise_first(number for number, _ in said)

    def run(self, function: Callable[[], R]) -> R:
        """Returns `function()`, run in a thread; see `StopRequest.run`. If one process stops, all do.

        After a stop, the devices may be used again only if `function` does not use them.
        """
        if self._cluster.count == 1:
            return self._request.run(function)

        job = Job(function)
        while True:
            job.wait(_POLL_SECONDS)
            if job.failed:
                return job.result()  # raises; the error ends all processes, including those that wait for this one

            # The processes exchange whether they are done, so that they leave this loop in the same iteration.
            said = self._cluster.gather("work", [self._request.received, job.ended])
            _raise_first(number for number, _ in said)
            if all(ended for _, ended in said):
                return job.result()

    def run_over(self, function: Callable[[ValidationBatches], R], batches: ValidationBatches) -> R:
        """Returns `function(batches)`, which uses the devices.

        A single process can be stopped at any moment. Several processes stop only between batches, because a collective
        operation must not be abandoned by some of them.
        """
        if self._cluster.count == 1:
            return self._request.run(lambda: function(batches))
        return function(_Watched(batches.batches, batches.num_sequences, self.check))


@dataclasses.dataclass(frozen=True)
class _Watched(ValidationBatches):
    """Batches that check, before each one, that all processes can continue."""

    check: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.check()
            yield batch


def _raise_first(numbers: Iterator[int | None]) -> None:
    """Raises Stopped for the first signal that any process received, if there is one."""
    received = [number for number in numbers if number is not None]
    if received:
        raise Stopped(received[0])
