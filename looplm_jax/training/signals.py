"""Handles SIGTERM, SIGHUP and Ctrl-C as requests to stop.

They are noticed between steps, and during compilations and evaluations.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from looplm_jax.stop_signals import stop_signals

R = TypeVar("R")

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
