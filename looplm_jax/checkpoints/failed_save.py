"""What is left of a save that failed: files, and threads of TensorStore that nobody can wait for.

They go on writing for a moment, and each then finds the event loop of Orbax closed, which the interpreter prints.
"""

import contextlib
import dataclasses
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from looplm_jax.checkpoints.step import StepFolder, delete, list_steps

_LONGEST_SECONDS = 30.0
_QUIET_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class _Unheard:
    """A hook for what nobody can catch, which leaves out what such threads have to say."""

    previous: Callable[[Any], Any]

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.previous(unraisable)


def leave_echoes_unheard() -> None:
    """Silences, from here to the end of the process, threads of a save that fails.

    Call it before the save starts: such a thread may end before the failure is reported, or at any later time.
    """
    if not isinstance(sys.unraisablehook, _Unheard):
        sys.unraisablehook = _Unheard(sys.unraisablehook)


@contextlib.contextmanager
def echoes_unheard() -> Iterator[None]:
    """Around a save: what its threads and coroutines have to say after it failed is not printed."""
    previous = sys.unraisablehook
    sys.unraisablehook = _Unheard(previous)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
            gc.collect()  # a coroutine that was cut off speaks when it is freed
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
