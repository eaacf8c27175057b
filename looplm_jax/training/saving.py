"""Saves of a run. A disk that refuses one does not stop the training: the next save may succeed, the last one must."""

from collections.abc import Callable
from typing import Any, TypeVar

from looplm_jax.checkpoints import CheckpointStore, Metadata, SaveError
from looplm_jax.distributed import Cluster

R = TypeVar("R")

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
        self._attempt(lambda: self._store.save(step, state, metadata, permanent=permanent))

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
        if self._cluster.count == 1:
            self._attempt(self._store.wait)
            return
        ended = [False]
        while not all(ended) and self._refused is None:
            ended = self._attempt(lambda: self._store.ended(_POLL_SECONDS))
        if self._refused is not None:
            self._store.abandon()

    def _attempt(self, work: Callable[[], R]) -> list[R | None]:
        """The results of all processes; where the disk refused one of them, that is kept."""
        result, reason = None, None
        try:
            result = work()
        except SaveError as error:
            reason = str(error)
        said = self._cluster.gather("save", [result, reason])
        reasons = [reason for _, reason in said if reason is not None]
        if reasons:
            self._refused = self._news = reasons[0]
        return [result for result, _ in said]
