"""Saves checkpoints of a run. Training continues after a refused save; only the last save must succeed."""

from collections.abc import Callable
from typing import Any

from looplm_jax.checkpoints import CheckpointStore, Metadata, SaveError
from looplm_jax.distributed import ProcessGroup
from looplm_jax.training._stopping import Job

_POLL_SECONDS = 0.2


class AsyncSaver:
    """Saves to a store in the background and keeps the errors. All processes must call its methods together."""

    def __init__(self, store: CheckpointStore, group: ProcessGroup):
        self._store, self._group = store, group
        self._refused: str | None = None  # why the latest save was refused
        self._unreported: str | None = None

    def save(self, step: int, state: Any, metadata: Metadata, *, permanent: bool) -> None:
        """Saves a step; see `CheckpointStore.save`. A `SaveError` is kept instead of raised."""
        # At most one save is running: each holds a copy of the state in the memory of the host.
        self._wait()

        self._refused = None
        store = self._store
        self._attempt(lambda: store.save(step, state, metadata, permanent=permanent))

    def finish(self) -> None:
        """Waits for the latest save.

        Raises:
          SaveError: the disk refused it, so the steps after the latest valid checkpoint are lost.
        """
        self._wait()
        if self._refused is not None:
            raise SaveError(self._refused)

    def pop_error(self) -> str | None:
        """Returns why a save was refused since the last call, or None."""
        error, self._unreported = self._unreported, None
        return error

    def _wait(self) -> None:
        """Waits until the latest save is committed on all processes, or refused on one of them."""
        if self._refused is None:
            self._attempt(self._store.wait)

    def _attempt(self, work: Callable[[], None]) -> None:
        """Runs `work()` on all processes. If the disk refuses it on one of them, the others stop waiting."""
        if self._group.count == 1:
            self._keep(_reason(work))
            return

        job = Job(lambda: _reason(work))
        ended = [False]
        # The processes exchange their results until all have saved or one of them was refused.
        while not all(ended) and self._refused is None:
            job.wait(_POLL_SECONDS)
            answers = self._group.gather("save", [job.ended, job.result() if job.ended else None])
            ended = [end for end, _ in answers]
            self._keep(next((why for _, why in answers if why is not None), None))

        # Another process failed. Orbax would wait for it for a long time, so the thread and its store are abandoned.
        if not job.ended:
            self._store = self._store.abandoned()

    def _keep(self, reason: str | None) -> None:
        """Stores the reason of a refused save."""
        if reason is not None:
            self._refused = self._unreported = reason


def _reason(work: Callable[[], None]) -> str | None:
    """Runs `work()` and returns why the disk refused it, or None."""
    try:
        work()
    except SaveError as error:
        return str(error)
    return None
