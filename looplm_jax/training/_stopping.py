"""Stops a run: a signal, or missing data on one process, stops all processes at the same step.

SIGTERM, SIGHUP and Ctrl-C are requests to stop. They are noticed between steps, and during compilations and
evaluations.
"""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from looplm_jax.data import ValidationBatches
from looplm_jax.data._packing import Batch
from looplm_jax.distributed import ProcessGroup
from looplm_jax.errors import UserError
from looplm_jax.terminal import stop_signals

R = TypeVar("R")

# Short for somebody who presses Ctrl-C, and long enough that polling costs nothing.
_POLL_SECONDS = 0.1


class Stopped(Exception):
    """A signal asked the run to stop. `signal` is that signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class StopRequest:
    """A context manager that records a stop signal instead of ending the process.

    The first SIGTERM, SIGHUP or Ctrl-C is recorded. A second Ctrl-C ends the process immediately. A SIGHUP or SIGINT
    that the process was started to ignore stays ignored (see `stop_signals`).

    Python delivers signals only to the main thread. In other threads no handler is installed and no request is ever
    recorded.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in stop_signals()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int | None:
        """The signal that was received, or None."""
        return self._received

    def check(self) -> None:
        """Raises `Stopped` if a signal was received."""
        if self._received is not None:
            raise Stopped(self._received)

    def run(self, function: Callable[[], R]) -> R:
        """Returns `function()`, run in a thread so that a signal is noticed while it compiles or computes.

        If a signal is received, raises `Stopped` immediately and abandons the thread, whose result is no longer needed.
        The process must then exit without waiting for that thread.
        """
        job = Job(function)
        # The main thread waits in short intervals, so that it can react to a signal.
        while not job.ended:
            job.wait(_POLL_SECONDS)
            self.check()
        return job.result()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame

        # Ctrl-C after any stop signal ends the process immediately.
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


class Job(Generic[R]):
    """A function that runs in a daemon thread, which ends with the process."""

    def __init__(self, function: Callable[[], R]):
        self._function = function
        self._value: list[R] = []
        self._error: BaseException | None = None
        # A thread inside XLA cannot be interrupted, so the process must be able to exit without it.
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the function has returned or raised an error."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the function has raised an error."""
        return self._error is not None

    def wait(self, seconds: float) -> None:
        """Waits until the function has ended, at most `seconds`."""
        self._thread.join(seconds)

    def result(self) -> R:
        """Returns the result of the function, or raises its error."""
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:  # of any type: `result` raises it in the calling thread
            self._error = error


# Consensus


class DataUnavailable(UserError):
    """A process could not read its part of the next batch. The message names the process and the reason."""


class StopConsensus:
    """Extends `StopRequest` from one process to all processes of a run.

    The processes communicate over the network while the devices still compute the previous step, so the devices do not
    wait. All processes must call each method at the same point.

    Args:
      group: the processes of the run.
      request: the stop request of this process.
    """

    def __init__(self, group: ProcessGroup, request: StopRequest):
        self._group, self._request = group, request

    def check(self, failure: str | None = None) -> None:
        """Returns if all processes can continue, and raises the same error on all of them otherwise.

        Args:
          failure: why this process cannot continue, or None.

        Raises:
          Stopped: one of the processes received a signal.
          DataUnavailable: one of them has a `failure`.
        """
        # One exchange a step serves both purposes, because each costs a round trip.
        answers = self._group.gather("step", [self._request.received, failure])
        # Missing data takes precedence over a signal, so that its reason is reported.
        failures = [(index, why) for index, (_, why) in enumerate(answers) if why is not None]

        if failures:
            index, why = failures[0]
            raise DataUnavailable(why if self._group.count == 1 else f"process {index}: {why}")

        _raise_first(number for number, _ in answers)

    def run(self, function: Callable[[], R]) -> R:
        """Returns `function()`, run in a thread; see `StopRequest.run`. If one process stops, all do.

        After a stop, the devices may be used again only if `function` does not use them.
        """
        # A single process needs no agreement.
        if self._group.count == 1:
            return self._request.run(function)

        job = Job(function)
        while True:
            job.wait(_POLL_SECONDS)
            if job.failed:
                return job.result()  # raises; the error ends all processes, including those that wait for this one

            # The processes exchange whether they are done, so that they leave this loop in the same iteration.
            answers = self._group.gather("work", [self._request.received, job.ended])
            _raise_first(number for number, _ in answers)
            if all(ended for _, ended in answers):
                return job.result()

    def run_over(self, function: Callable[[ValidationBatches], R], batches: ValidationBatches) -> R:
        """Returns `function(batches)`, which uses the devices.

        A single process can be stopped at any moment. Several processes stop only between batches, because a collective
        operation must not be abandoned by some of them.
        """
        if self._group.count == 1:
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
