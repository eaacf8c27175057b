"""Deferred signals: an exception such as KeyboardInterrupt must not arise between a donation and its result.

    with deferred_signals:
        slots, ticked = run_ticks(slots)

Python runs signal handlers in the main thread, between any two bytecode instructions. A handler that raises after a
program has consumed its donated arrays, and before its results are stored, would lose both.
"""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_NAMES = ("INT", "TERM", "HUP", "QUIT", "ALRM", "VTALRM", "PROF", "USR1", "USR2", "BREAK")
_SIGNALS = tuple(getattr(signal, f"SIG{name}") for name in _NAMES if hasattr(signal, f"SIG{name}"))


class _DeferredSignals:
    """A context that defers signal handlers until it exits.

    It can be nested, and has no effect outside the main thread.

    The second signal of a kind is not deferred, so that pressing Ctrl-C twice takes effect at once.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: list[int] = []
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._own = self._receive  # a single object, so that it can be recognized

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if self._depth == 0:
            try:
                self._install()
            except BaseException:  # raised by a handler that ran at once: nothing is deferred then
                self._restore()
                raise
        self._depth += 1  # last: until here, a signal is handled at once, and an exception leaves no state behind

    def __exit__(self, *exception: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._depth -= 1  # first: from here on, a signal is handled at once, even if it interrupts the lines below
        if self._depth:
            return

        try:
            self._restore()
        except BaseException:
            # The first attempt was interrupted by a handler; restoring twice is harmless.
            self._restore()
            raise

        while self._waiting:
            number = self._waiting.pop(0)
            self._handlers[number](number, None)

    def _install(self) -> None:
        """Replaces all Python handlers. Default actions and ignored signals are left alone."""
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            # SIG_DFL and SIG_IGN are not callable: they do not run Python code.
            if callable(handler) and handler is not self._own:
                self._handlers[number] = handler
                signal.signal(number, self._own)

    def _restore(self) -> None:
        """Restores the handlers, except those that changed in the meantime."""
        for number, handler in self._handlers.items():
            # A handler that the block installed stays.
            if signal.getsignal(number) is self._own:
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handles all signals while they are deferred."""
        if self._depth and number not in self._waiting:
            self._waiting.append(number)
        else:
            self._handlers[number](number, frame)


deferred_signals = _DeferredSignals()
