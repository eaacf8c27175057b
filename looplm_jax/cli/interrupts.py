"""Ctrl-C as a request to end what is under way, so that it can end cleanly; and the end of a stopped process."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from rich.console import Console


def leave(console: Console, message: str, number: signal.Signals) -> NoReturn:
    """End the process without waiting for a compilation that was left behind, which Python would not survive."""
    with contextlib.suppress(OSError):  # the terminal may be gone: that is what SIGHUP says
        console.print(f"looplm: {message}")
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(128 + number)


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
