"""The checkpoints of one run: saved in the background, a few kept, the newest good one restored."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax

from looplm_jax.checkpoints.errors import DamagedError, OtherVersionError, SaveError, UnreadableError
from looplm_jax.checkpoints.failed_save import silence_late_reports
from looplm_jax.checkpoints.metadata import Metadata
from looplm_jax.checkpoints.paths import checkpoint_path
from looplm_jax.checkpoints.reading import Restored, candidates, restore
from looplm_jax.checkpoints.step import (
    StepFolder,
    Writing,
    delete,
    list_steps,
    read_sidecar,
    set_aside,
    start_writing,
    write_failure,
)
from looplm_jax.checkpoints.tree import flatten
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE, refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Pending:
    step: int
    writing: Writing


class CheckpointStore:
    """The folder `<run>/checkpoints`, owned by one run. A step is there as a whole, or not at all.

    The newest `keep` steps are kept, and the permanent ones besides. An older step is deleted only after a newer one is
    committed. What this store could not restore is deleted only where it was damaged; a step of another version stays,
    under another name once a step of its number is saved. In a run of many processes each makes a store of the same
    folder and calls it at the same points.

    Raises:
      UserError: no checkpoint can be kept in a folder of this name.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int, asynchronous: bool = True):
        self._folder = checkpoint_path(folder)
        self._keep = keep
        self._asynchronous = asynchronous
        self._pending: _Pending | None = None
        self._current: int | None = None
        self._damaged: frozenset[int] = frozenset()
        self._other_version: frozenset[int] = frozenset()
        self._is_abandoned = False

    def save(self, step: int, state: Any, metadata: Metadata, *, permanent: bool = False) -> None:
        """Saves `state` in the background; once this returns, its buffers may be donated.

        Waits for the save before it. Does nothing if `step` is what this store saved or restored last.

        Args:
          step: greater than every good step of the folder.
          state: a pytree of `jax.Array`, all on the same devices.
          metadata: what describes it.
          permanent: whether the step is kept when it is no longer among the newest.

        Raises:
          SaveError: the disk refused this save or the one before.
          UserError: the folder holds a step as new.
        """
        self.wait()
        if step == self._current:
            return
        with self._naming_failed_writes(step):
            self._require_newest(step)
            self._sweep()
            self._set_aside(step)
            silence_late_reports()
            path = self._folder / str(step)
            writing = start_writing(path, flatten(state), metadata, permanent=permanent)
        self._pending = _Pending(step=step, writing=writing)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is committed, then deletes the steps that are not kept.

        Raises:
          SaveError: the disk refused the save.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        with self._naming_failed_writes(pending.step):
            pending.writing.result()
        self._current = pending.step
        with contextlib.suppress(
            OSError
        ):  # what the disk or the bucket does not let go is tried again after the next save
            self._delete_old()

    def abandoned(self) -> "CheckpointStore":
        """A store in the place of this one, in which a thread waits for a save that cannot succeed.

        Another process was refused, and Orbax waits for it for long. What that thread does in the end is no harm.
        """
        store = CheckpointStore(self._folder, keep=self._keep, asynchronous=self._asynchronous)
        store._current, store._damaged, store._other_version = self._current, self._damaged, self._other_version
        self._is_abandoned, self._pending = True, None
        return store

    def close(self) -> None:
        """The same as `wait`: nothing else is held open."""
        self.wait()

    def steps(self) -> list[int]:
        """The committed steps, oldest first, as they are on the disk now."""
        return [folder.step for folder in self._committed()]

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """The newest good state, or that of `step`, with every array checked against its digest.

        Args:
          abstract_state: the state as a tree of `jax.ShapeDtypeStruct`, or a function that makes it of the metadata;
            shardings may differ from those saved.
          step: the step; None means the newest good one.

        Raises:
          UserError: there is no good step, or it holds other arrays.
        """
        describe = abstract_state if callable(abstract_state) else lambda _: abstract_state
        folders = candidates(os.fspath(self._folder), step)
        restored = restore(folders, lambda sidecar: describe(sidecar.metadata))
        self._current = restored.step
        self._damaged = frozenset(passed.step for passed in restored.damaged if not passed.other_version)
        self._other_version = frozenset(passed.step for passed in restored.damaged if passed.other_version)
        return restored

    def _committed(self) -> list[StepFolder]:
        return [folder for folder in list_steps(self._folder) if folder.committed]

    def _good(self) -> list[StepFolder]:
        passed_over = self._damaged | self._other_version
        return [folder for folder in self._committed() if folder.step not in passed_over]

    def _require_newest(self, step: int) -> None:
        newest = max((folder.step for folder in self._good()), default=-1)
        if step <= newest:
            raise UserError(
                f"{self._folder} already holds step {newest}, cannot save step {step}: "
                "continue from the newest step, or use another folder"
            )

    def _sweep(self) -> None:
        """Removes what an interrupted save or deletion left behind."""
        for folder in list_steps(self._folder):
            if not folder.committed and jax.process_index() == 0:
                delete(folder)

    def _set_aside(self, step: int) -> None:
        """A whole step of another version makes room for one that this version saves."""
        if step in self._other_version and jax.process_index() == 0:
            for folder in self._committed():
                if folder.step == step:
                    set_aside(folder)
        self._other_version -= {step}

    def _delete_old(self) -> None:
        self._damaged -= {self._current}
        old = self._good()[: -self._keep]
        damaged = [folder for folder in self._committed() if folder.step in self._damaged]
        for folder in old + damaged:
            if jax.process_index() == 0 and (folder in damaged or not _is_permanent(folder)):
                delete(folder)

    @contextlib.contextmanager
    def _naming_failed_writes(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            reason = write_failure(error, self._folder)
            if reason is None:
                raise
            if not self._is_abandoned:  # by now another save may be under way
                with contextlib.suppress(OSError):
                    self._sweep()
            raise SaveError(self._failure(step, reason)) from error

    def _failure(self, step: int, reason: str) -> str:
        remedy = "free space" if reason == NO_SPACE else "mend that"
        return f"{reason} while saving step {step} to {self._folder}: {remedy} and resume; {self._newest()}"

    def _newest(self) -> str:
        try:
            good = self._good()
        except Exception as error:
            if refusal(error, self._folder) is None:
                raise
            return "what was saved before cannot be listed now"
        return f"step {good[-1].step} is the newest good one" if good else "no step was saved before"


def _is_permanent(folder: StepFolder) -> bool:
    """A step whose metadata cannot be read is kept: nothing of value is deleted by mistake."""
    try:
        return read_sidecar(folder).permanent
    except (DamagedError, OtherVersionError, UnreadableError):
        return True
