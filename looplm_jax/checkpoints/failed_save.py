"""What remains of a save that failed: files, threads of TensorStore, and coroutines of Orbax.

Orbax does not wait for them. The threads keep writing for a moment and then find the event loop closed; the coroutines
were never started. The interpreter would print both at any later time, although the user has read why the save failed.
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
    """An unraisable hook that drops the reports of a failed save and passes all others to `previous`."""

    previous: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if not re.match(f"Event loop is closed|{_NEVER_AWAITED}", str(unraisable.exc_value)):
            self.previous(unraisable)


def silence_late_reports() -> None:
    """Silences threads and coroutines of failed saves until the process ends.

    Call it before a save starts: a thread may end before the failure is reported, or at any later time.
    """
    if not isinstance(sys.unraisablehook, _WithoutLateReports):
        sys.unraisablehook = _WithoutLateReports(sys.unraisablehook)
        warnings.filterwarnings("ignore", _NEVER_AWAITED, RuntimeWarning)


@contextlib.contextmanager
def late_reports_silenced() -> Iterator[None]:
    """Silences threads and coroutines of a save that fails inside the context."""
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
    """Removes what `folder` holds of an unfinished `step`, and again what such threads make anew, until it stays away.

    Half a minute at most. What the disk refuses to list or to delete stays.
    """
    deadline = time.monotonic() + _LONGEST_SECONDS
    left = True
    with contextlib.suppress(OSError):  # the user reads why the save failed, not that the folder cannot be listed
        while left and time.monotonic() < deadline:
            for unfinished in _unfinished(folder, step):
                with contextlib.suppress(OSError):
                    delete(unfinished)
            time.sleep(_QUIET_SECONDS)
            left = bool(_unfinished(folder, step))


def _unfinished(folder: epath.Path, step: int) -> list[StepFolder]:
    return [found for found in list_steps(folder) if found.step == step and not found.committed]
