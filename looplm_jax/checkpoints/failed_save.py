"""What is left of a save that failed: files, and threads of TensorStore that nobody can wait for.

They go on writing for a moment, and each then finds the event loop of Orbax closed, which the interpreter prints.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

_LONGEST_SECONDS = 30.0
_QUIET_SECONDS = 0.5


def remove_failed(folder: epath.Path) -> None:
    """Removes `folder`, and again what such threads make anew, until it stays away; half a minute at most."""
    deadline = time.monotonic() + _LONGEST_SECONDS
    gone = False
    with _unheard():
        while not gone and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(_QUIET_SECONDS)
            gone = not folder.exists()


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous
