"""Saves of a run. A disk that refuses one does not stop the training: the next save may succeed, the last one must."""

from collections.abc import Callable
from typing import Any

from looplm_jax.checkpoints import CheckpointStore, Metadata, SaveError
from looplm_jax.distributed import Cluster
from looplm_jax.training.signals import Job

_POLL_SECONDS = 0.2


class Saver:
    """Saves to a store, and keeps what the disk said for whoever asks. All processes must call it together."""

    def __init__(self, store: CheckpointStore, cluster: Cluster):
        self._store, self._cluster = store, cluster
        self._refused: str | None = None  # the newest save
        self._news: str | None = None

    def save(self, step: int, state: Any, metadata: Metadata, *, permanent: bool) -> None:
        """See `CheckpointStore.save`; a `SaveError` is kept."""
        self._wait()
        self._refused = None
        store = self._store
        self._attempt(lambda: store.save(step, state, metadata, permanent=permanent))

    def finish(self) -> None:
        """Wait for the newest save.

        Raises:
          SaveError: the disk refused it: the steps after the newest good one are lost.
        """
        self._wait()
        if self._refused is not None:
            raise SaveError(self._refused)

    def news(self) -> str | None:
        """What the disk refused since this was asked last."""
        news, self._news = self._news, None
        return news

    def _wait(self) -> None:
        """Until the newest save is committed on all processes, or the disk refused it to one of them."""
        if self._refused is None:
            self._attempt(self._store.wait)

    def _attempt(self, work: Callable[[], None]) -> None:
        """`work()` on all processes. Where the disk refuses one, that is kept, and the others wait no longer."""
        if self._cluster.count == 1:
            self._keep(_reason(work))
            return
        job = Job(lambda: _reason(work))
        ended = [False]
        while not all(ended) and self._refused is None:
            job.wait(_POLL_SECONDS)
            said = self._cluster.gather("save", [job.ended, job.result() if job.ended else None])
            ended = [end for end, _ in said]
            self._keep(next((why for _, why in said if why is not None), None))
        if not job.ended:
            self._store = self._store.abandoned()

    def _keep(self, reason: str | None) -> None:
        if reason is not None:
            self._refused = self._news = reason


def _reason(work: Callable[[], None]) -> str | None:
    """Why the disk refuses, if it does."""
    try:
        work()
    except SaveError as error:
        return str(error)
    return None
