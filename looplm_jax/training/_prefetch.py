"""Reads training batches one ahead. Failed reads are retried by reopening the stream, then reported."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from looplm_jax.data._packing import Batch
from looplm_jax.errors import UserError

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt


@runtime_checkable
class Batches(Protocol):
    """A stream of batches that can be reopened at an earlier position."""

    def __next__(self) -> Batch:
        """Returns the next batch."""

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at a position."""

    def close(self) -> None:
        """Stops the threads of the stream."""


class Reader:
    """Reads a stream one batch ahead of its state.

    Args:
      open_batches: opens the stream at its beginning.
      say: receives lines for the user.
      start: the position to begin at; None is the beginning.
      waits: the seconds before each retry.
    """

    def __init__(
        self,
        open_batches: Callable[[], Batches],
        say: Callable[[str], None],
        *,
        start: Mapping[str, Any] | None = None,
        waits: tuple[float, ...] = WAITS,
    ):
        self._open, self._say, self._waits = open_batches, say, waits
        self._batches = open_batches()
        if start is not None:
            self._batches.restore(start)
        self._ahead: Batch | None = None
        self._place = self._batches.state()

    def read_ahead(self) -> str | None:
        """Reads the next batch. Returns None, or the reason if the read fails after all retries."""
        for attempt, wait in enumerate((*self._waits, None)):
            try:
                # A retry reopens the stream, because a failed source may have left it in an undefined state.
                if attempt:
                    self._reopen()
                self._ahead = next(self._batches)
                return None
            except (UserError, OSError) as error:
                if wait is None:
                    return str(error)
                self._say(f"warning: {error}; trying again in {wait:g} s")
            time.sleep(wait)
        return None

    def take(self) -> Batch:
        """Returns the batch that was read ahead, and advances `state` to the position after it."""
        batch, self._ahead = self._ahead, None
        assert batch is not None
        self._place = self._batches.state()
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was taken."""
        return self._place

    def close(self) -> None:
        """Stops the threads of the stream."""
        self._batches.close()

    def _reopen(self) -> None:
        """Reopens the stream at the position after the last batch that was taken."""
        self._batches.close()
        self._batches = self._open()
        self._batches.restore(self._place)
