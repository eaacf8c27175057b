"""Processes that tests start. Each ends with its test."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def hangups_are_not_ignored() -> Iterator[None]:
    """Makes processes that start in the block handle SIGHUP as in a terminal, even if the tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def running(command: list[Any], **options: Any) -> Iterator[subprocess.Popen]:
    """Starts a process in a new session, and kills it and its children at the end of the block."""
    with subprocess.Popen(list(map(str, command)), start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
