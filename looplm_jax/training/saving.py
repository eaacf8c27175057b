"""Saves of a run. A disk that refuses one does not stop the training: the next save may succeed, the last one must."""

from collections.abc import Callable
from typing import Any

from looplm_jax.checkpoints import CheckpointStore, Metadata, SaveError
from looplm_jax.distributed import Cluster


class Saver:
    """Saves to a store, and keeps what the disk said for whoever asks. All processes must call it together."""

    def __init__(self, store: CheckpointStore, cluster: Cluster):
        self._store, self._cluster = store, cluster
        self._refused: str | None = None  # the newest save
        self._news: str | None = None

    def save(self, step: int, state: Any, metadata: Metadata, *, permanent: bool) -> None:
        """See `CheckpointStore.save`; a `SaveError` is kept."""
        self._attempt(self._store.wait)
        self._refused = None
        self._attempt(lambda: self._store.save(step, state, metadata, permanent=permanent))

    def finish(self) -> None:
        """Wait for the newest save.

        Raises:
          SaveError: the disk refused it: the steps after the newest good one are lost.
        """
        self._attempt(self._store.wait)
        if self._refused is not None:
            raise SaveError(self._refused)

    def news(self) -> str | None:
        """What the disk refused since this was asked last."""
        news, self._news = self._news, None
        return news

    def _attempt(self, work: Callable[[], None]) -> None:
        reason = None
        try:
            work()
        except SaveError as error:
            reason = str(error)
        reasons = [said for said in self._cluster.gather("save", reason) if said is not None]
        if reasons:
            self._refused = self._news = reasons[0]
