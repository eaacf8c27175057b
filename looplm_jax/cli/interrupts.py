"""Turns Ctrl-C into a request to end the current work cleanly, and ends a process that was stopped by a signal."""

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
    """Ends the process without waiting for a compilation in another thread, which would crash a normal exit."""
    with contextlib.suppress(OSError):  # after SIGHUP the terminal may be gone
        console.print(f"looplm: {message}")
        sys.stdout.flush()
        sys.stderr.flush()
    # 128 + n is the exit status that shells give to a process killed by signal n.
    os._exit(128 + number)


@contextlib.contextmanager
def interrupt_calls(end: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first Ctrl-C calls `end` instead of raising; a second one raises as usual.

    Python delivers signals only to the main thread; in other threads the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        # Restored first, so that a second Ctrl-C works while `end` runs.
        signal.signal(number, before)
        end()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
