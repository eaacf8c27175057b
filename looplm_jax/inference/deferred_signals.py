"""Signals that wait: an exception such as KeyboardInterrupt must not fall between a donation and what it returns.

    with deferred_signals:
        slots, ticked = run_ticks(slots)

Python runs signal handlers in the main thread, between any two of its instructions. A handler that raises there, after
a program has consumed its donated arrays and before its results are stored, would lose both.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_NAMES = ("INT", "TERM", "HUP", "QUIT", "ALRM", "VTALRM", "PROF", "USR1", "USR2", "BREAK")
_SIGNALS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))


class _DeferredSignals:
    """A context in which the handlers of signals wait for its end. It can be nested; threads but the main one are free.

    The second signal of a kind does not wait: whoever presses Ctrl-C twice is heard at once.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._own = self._receive  # one object, to be recognized

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._depth == 0:
            try:
                self._install()
            except BaseException:  # of a handler that was passed on: nothing is deferred then
                self._restore()
                raise
        self._depth += 1  # last: until here, a signal is passed on, and what it raises leaves nothing behind

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1  # first: from here on, a signal is passed on, even if it interrupts what follows
        if self._depth:
            return
        try:
            self._restore()
        except BaseException:
            self._restore()
            raise
        while self._waiting:
            number = self._waiting.pop(0)
            self._handlers[number](number, None)

    def _install(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and handler is not self._own:
                self._handlers[number] = handler
                signal.signal(number, self._own)

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            if signal.getsignal(number) is self._own:
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals meanwhile."""
        if self._depth and number not in self._waiting:
            self._waiting.append(number)
        else:
            self._handlers[number](number, frame)


deferred_signals = _DeferredSignals()
