"""The checkpoints of one run: saved asynchronously, pruned to a few, restored from the latest valid one."""

import contextlib
import dataclasses
import gc
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from looplm_jax.checkpoints._arrays import flatten
from looplm_jax.checkpoints._metadata import DamagedError, Metadata, OtherVersionError, SaveError, UnreadableError
from looplm_jax.checkpoints._paths import checkpoint_path
from looplm_jax.checkpoints._restore import Restored, find_steps, restore
from looplm_jax.checkpoints._step import (
    AsyncWrite,
    LostFolderError,
    StepFolder,
    delete,
    list_steps,
    read_metadata_file,
    set_aside,
    start_write,
    write_failure,
)
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE, refusal

_LONGEST_SECONDS = 30.0
_QUIET_SECONDS = 0.5
_NEVER_AWAITED = r"coroutine '.*(serialize|\.write).*' was never awaited"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pending:
    """A save that is not committed yet."""

    step: int
    writing: AsyncWrite


class CheckpointStore:
    """The folder `<run>/checkpoints`, owned by one run. Each step is committed atomically.

    The newest `keep` steps and all permanent ones are kept. An older step is deleted only after a newer one is
    committed. A step that this store could not restore is deleted only if it was damaged. A step of another version is
    kept, and renamed when a step with its number is saved. In a run of several processes, each process creates a store
    of the same folder and calls its methods at the same points.

    Args:
      folder: the folder of the steps.
      keep: the number of newest steps to keep. Permanent steps are always kept.
      asynchronous: whether `save` returns before the step is committed.

    Raises:
      UserError: no checkpoint can be stored in a folder of this name.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int, asynchronous: bool = True):
        self._folder = checkpoint_path(folder)
        self._keep = keep
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None
        # The step that was saved or restored last, and the steps that the last restore skipped.
        self._current: int | None = None
        self._damaged: frozenset[int] = frozenset()
        self._other_version: frozenset[int] = frozenset()
        self._is_abandoned = False

    # Saving

    def save(self, step: int, state: Any, metadata: Metadata, *, permanent: bool = False) -> None:
        """Saves `state` asynchronously. Once this returns, its buffers may be donated.

        Waits for the previous save first. Does nothing if `step` was the last step that this store saved or restored.

        Args:
          step: a number greater than that of every valid step in the folder.
          state: a pytree of `jax.Array`, all on the same devices.
          metadata: the metadata of the step.
          permanent: whether the step is exempt from pruning.

        Raises:
          SaveError: the file system refused this save or the previous one.
          UserError: the folder contains a step that is not older.
        """
        self.wait()
        # A run that stops right after a save, or right after it resumed, saves the same step again.
        if step == self._current:
            return

        with self._naming_failed_writes(step):
            # Everything that could be in the way of the new step is dealt with before it is written.
            self._require_newest(step)
            self._sweep()
            self._set_aside(step)
            silence_late_reports()
            path = self._folder / str(step)
            writing = start_write(path, flatten(state), metadata, permanent=permanent)

        self._pending = _Pending(step=step, writing=writing)

        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed, then deletes the steps that are not kept.

        Raises:
          SaveError: the file system refused the save.
        """
        if self._pending is None:
            return

        # Cleared first: a failed save must not be waited for twice.
        pending, self._pending = self._pending, None
        with self._naming_failed_writes(pending.step):
            try:
                pending.writing.result()
            except LostFolderError:
                # Orbax has created the folder again. Nothing may remain where the user has moved it away.
                remove_failed(self._folder, pending.step)
                with contextlib.suppress(OSError):  # not empty
                    self._folder.rmdir()
                raise

        self._current = pending.step
        with contextlib.suppress(OSError):  # a refused deletion is retried after the next save
            self._delete_old()

    def abandoned(self) -> "CheckpointStore":
        """Returns a store that replaces this one while a thread of this one waits for a save that cannot succeed.

        Orbax waits long for a process whose write was refused. The result of that thread has no effect.
        """
        store = CheckpointStore(self._folder, keep=self._keep, asynchronous=self._asynchronous)
        store._current, store._damaged, store._other_version = self._current, self._damaged, self._other_version
        # From here on, a failure of the old save must not sweep away files of the new store.
        self._is_abandoned, self._pending = True, None
        return store

    def close(self) -> None:
        """Waits for the last save, as `wait` does. There is nothing else to close."""
        self.wait()

    # Restoring

    def steps(self) -> list[int]:
        """Returns the numbers of the steps committed on disk, oldest first."""
        return [folder.step for folder in self._committed()]

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Returns the latest valid state, or that of `step`, with every array checked against its digest.

        Args:
          abstract_state: the state as a tree of `jax.ShapeDtypeStruct`, or a function that returns it for the metadata.
            Its shardings may differ from the saved ones.
          step: the number of the step. None selects the latest valid step.

        Raises:
          UserError: no step is valid, or the step contains other arrays.
        """
        describe = abstract_state if callable(abstract_state) else lambda _: abstract_state
        folders = find_steps(os.fspath(self._folder), step)
        restored = restore(folders, lambda saved: describe(saved.metadata))

        self._current = restored.step
        # Later saves need to know which steps are valid and which may be deleted.
        self._damaged = frozenset(passed.step for passed in restored.skipped if not passed.other_version)
        self._other_version = frozenset(passed.step for passed in restored.skipped if passed.other_version)
        return restored

    # Deleting

    def _committed(self) -> list[StepFolder]:
        return [folder for folder in list_steps(self._folder) if folder.committed]

    def _valid(self) -> list[StepFolder]:
        """Returns the committed steps that the last restore did not skip."""
        skipped = self._damaged | self._other_version
        return [folder for folder in self._committed() if folder.step not in skipped]

    def _require_newest(self, step: int) -> None:
        """Raises UserError if `step` is not newer than every valid step."""
        # Damaged steps do not count: a run that went back to an earlier step saves their numbers again.
        newest = max((folder.step for folder in self._valid()), default=-1)
        if step <= newest:
            raise UserError(
                f"{self._folder} already holds step {newest}, cannot save step {step}: "
                "continue from the newest step, or use another folder"
            )

    def _sweep(self) -> None:
        """Removes the remains of an interrupted save or deletion."""
        for folder in list_steps(self._folder):
            if not folder.committed and jax.process_index() == 0:
                delete(folder)

    def _set_aside(self, step: int) -> None:
        """Renames a complete step of another version before a step with its number is saved."""
        if step in self._other_version and jax.process_index() == 0:
            for folder in self._committed():
                if folder.step == step:
                    set_aside(folder)
        self._other_version -= {step}

    def _delete_old(self) -> None:
        """Deletes the steps that are not kept, and the damaged ones."""
        # A damaged step may have been replaced by the step that was just committed.
        self._damaged -= {self._current}

        old = self._valid()[: -self._keep]
        damaged = [folder for folder in self._committed() if folder.step in self._damaged]
        for folder in old + damaged:
            # Permanent steps are kept, except that a damaged one is of no use.
            if jax.process_index() == 0 and (folder in damaged or not _is_permanent(folder)):
                delete(folder)

    # Errors

    @contextlib.contextmanager
    def _naming_failed_writes(self, step: int) -> Iterator[None]:
        """Converts refused writes to SaveError and removes the partial files."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = write_failure(error, self._folder)
            if reason is None:
                raise
            if not self._is_abandoned:  # the store that replaced this one may be saving now
                with contextlib.suppress(OSError):
                    self._sweep()
            raise SaveError(self._failure(step, reason)) from error

    def _failure(self, step: int, reason: str) -> str:
        """Returns the message of a failed save."""
        remedy = "free space" if reason == NO_SPACE else "fix that"
        return f"{reason} while saving step {step} to {self._folder}: {remedy} and resume; {self._latest_valid()}"

    def _latest_valid(self) -> str:
        """Returns a clause that names the latest valid step."""
        try:
            valid = self._valid()
        except Exception as error:
            if refusal(error, self._folder) is None:
                raise
            return "what was saved before cannot be listed now"
        return f"step {valid[-1].step} is the latest valid one" if valid else "no step was saved before"


def _is_permanent(folder: StepFolder) -> bool:
    """Whether a step is exempt from pruning.

    A step with unreadable metadata is exempt too, so that nothing of value is deleted.
    """
    try:
        return read_metadata_file(folder).permanent
    except (DamagedError, OtherVersionError, UnreadableError):
        return True


# Failed saves
#
# Orbax does not wait for what a failed save leaves: threads of TensorStore that keep writing for a moment and then find
# the event loop closed, and coroutines that were never started. The interpreter would print both at an arbitrary later
# time, although the reason of the failure has already been reported.


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
    # Threads of the failed save may still create files, so one pass is not enough.
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
