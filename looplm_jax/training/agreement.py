"""All processes of a run stop at the same step, whichever of them was asked to, or can go no further."""

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
    """A process could not read its share of the next batch. The message says which and why."""


class Agreement:
    """What `StopRequest` is to one process, for all processes of a run together.

    They agree over the network, while the devices still compute the step before, so nobody waits for it. Every method
    must be called by all of them at the same point.
    """

    def __init__(self, cluster: Cluster, request: StopRequest):
        self._cluster, self._request = cluster, request

    def check(self, failure: str | None = None) -> None:
        """Go on, or stop here, all alike.

        Args:
          failure: why this process has nothing to go on with.

        Raises:
          Stopped: a signal came to one of the processes.
          OutOfData: one of them has a `failure`.
        """
        said = self._cluster.gather("step", [self._request.received, failure])
        failures = [(index, why) for index, (_, why) in enumerate(said) if why is not None]
        if failures:
            index, why = failures[0]
            raise OutOfData(why if self._cluster.count == 1 else f"process {index}: {why}")
        _raise_first(number for number, _ in said)

    def run(self, function: Callable[[], R]) -> R:
        """`function()` in a thread of its own; see `StopRequest.run`. Where one process stops, all do.

        After a stop the devices may be used again only if `function` does not use them.
        """
        if self._cluster.count == 1:
            return self._request.run(function)
        job = Job(function)
        while True:
            job.wait(_POLL_SECONDS)
            if job.failed:
                return job.result()  # raises; the others may be waiting for this job, and hear of it when it ends all
            said = self._cluster.gather("work", [self._request.received, job.ended])
            _raise_first(number for number, _ in said)
            if all(ended for _, ended in said):
                return job.result()

    def run_over(self, function: Callable[[ValidationBatches], R], batches: ValidationBatches) -> R:
        """`function(batches)`, which uses the devices. One process leaves it at once, many leave it between batches."""
        if self._cluster.count == 1:
            return self._request.run(lambda: function(batches))
        return function(_Watched(batches.batches, batches.num_sequences, self.check))


@dataclasses.dataclass(frozen=True)
class _Watched(ValidationBatches):
    """Batches before each of which all processes agree to go on."""

    check: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.check()
            yield batch


def _raise_first(numbers: Iterator[int | None]) -> None:
    received = [number for number in numbers if number is not None]
    if received:
        raise Stopped(received[0])
