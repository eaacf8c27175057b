"""Ctrl-C as a request to end what is under way, so that it can end cleanly."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def interrupt_calls(end: Callable[[], None]) -> Iterator[None]:
    """While the block runs, Ctrl-C calls `end` instead of raising, once; a second Ctrl-C raises as ever.

    Signals reach only the main thread of Python; elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, before)
        end()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
