"""Cleans up after a failed save: partial files, threads of TensorStore, and coroutines of Orbax.

Orbax waits for none of them. The threads keep writing for a moment and then find the event loop closed; the coroutines
were never started. The interpreter would print both at an arbitrary later time, although the reason of the failure has
already been reported.
"""

import contextlib
import dataclasses
import gc
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from looplm_jax.checkpoints.step import StepFolder, delete, list_steps

_LONGEST_SECONDS = 30.0
_QUIET_SECONDS = 0.5
_NEVER_AWAITED = r"coroutine '.*(serialize|\.write).*' was never awaited"


@dataclasses.dataclass(frozen=True)
class _WithoutLateReports:
    """An unraisable hook that drops the reports of a failed save and forwards all others to `previous`."""

    previous: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if not re.match(f"Event loop is closed|{_NEVER_AWAITED}", str(unraisable.exc_value)):
            self.previous(unraisable)


def silence_late_reports() -> None:
    """Silences threads and coroutines of failed saves until the process ends.

    Must be called before a save starts, because a thread may end before the failure is reported or at any later time.
    """
    if not isinstance(sys.unraisablehook, _WithoutLateReports):
        sys.unraisablehook = _WithoutLateReports(sys.unraisablehook)
        warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)


@contextlib.contextmanager
def late_reports_silenced() -> Iterator[None]:
    """A context manager that silences threads and coroutines of a save that fails inside it."""
    previous = sys.unraisablehook
    sys.unraisablehook = _WithoutLateReports(previous)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)
            yield
            gc.collect()  # the interpreter reports an unfinished coroutine when it frees it
    finally:
        sys.unraisablehook = previous


def remove_failed(folder: epath.Path, step: int) -> None:
    """Removes the files of an unfinished `step` from `folder`, repeatedly, until its threads stop recreating them.

    Takes at most half a minute. Files that the file system refuses to list or delete remain.
    """
    deadline = time.monotonic() + _LONGEST_SECONDS
    left = True
    with contextlib.suppress(OSError):  # the error to report is the failed save, not a folder that cannot be listed
        while left and time.monotonic() < deadline:
            for unfinished in _unfinished(folder, step):
                with contextlib.suppress(OSError):
                    delete(unfinished)
            time.sleep(_QUIET_SECONDS)
            left = bool(_unfinished(folder, step))


def _unfinished(folder: epath.Path, step: int) -> list[StepFolder]:
    """Returns the folders of `step` that are not committed."""
    return [found for found in list_steps(folder) if found.step == step and not found.committed]
