"""SIGTERM, SIGHUP and Ctrl-C as a request to stop, noticed between steps, compilations and evaluations included."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from looplm_jax.stop_signals import stop_signals

R = TypeVar("R")

_POLL_SECONDS = 0.1


class Stopped(Exception):
    """A signal asked the run to stop. `signal` is which one."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class StopRequest:
    """While entered, the first SIGTERM, SIGHUP or Ctrl-C is remembered instead of ending the process; a second Ctrl-C
    ends it at once. A SIGHUP or SIGINT that the process was started to ignore stays ignored (see `stop_signals`).

    Signals reach only the main thread of Python; elsewhere nothing is installed and no request ever comes.
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
        """The signal that came."""
        return self._received

    def check(self) -> None:
        """Raise `Stopped` if a signal came."""
        if self._received is not None:
            raise Stopped(self._received)

    def run(self, function: Callable[[], R]) -> R:
        """`function()` in a thread of its own, so that a signal is noticed while it compiles or computes.

        Where one comes, raises `Stopped` at once and leaves the thread behind: its result is not wanted any more.
        Whoever ends the process then must not wait for it.
        """
        job = Job(function)
        while not job.ended:
            job.wait(_POLL_SECONDS)
            self.check()
        return job.result()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


class Job(Generic[R]):
    """A function at work in a thread of its own, which ends with the process."""

    def __init__(self, function: Callable[[], R]):
        self._function = function
        self._value: list[R] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether there is a result."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self._error is not None

    def wait(self, seconds: float) -> None:
        """Until it has ended, or so long at most."""
        self._thread.join(seconds)

    def result(self) -> R:
        """What the function returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._value[0]

    def _run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:  # whatever it is, it is raised again where the result is asked for
            self._error = error
