"""The next batch, read before anyone depends on it: a source that vanishes is asked again, and then given up."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from looplm_jax.data.packing import Batch
from looplm_jax.errors import UserError

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt


@runtime_checkable
class Batches(Protocol):
    """A stream that can be opened again where it was."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state(self) -> dict[str, Any]:
        """The place after it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue there."""

    def close(self) -> None:
        """Stop its threads."""


class Reader:
    """Reads a stream one batch ahead of its state.

    Args:
      open_batches: opens the stream, at its beginning.
      say: what to do with a line for the user.
      start: the place to begin at.
      waits: seconds before each new attempt.
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
        """Have the next batch ready. Where that fails, and fails again after every wait, returns why."""
        for attempt, wait in enumerate((*self._waits, None)):
            try:
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
        """The batch that was read ahead; from now on `state` is the place after it."""
        batch, self._ahead = self._ahead, None
        assert batch is not None
        self._place = self._batches.state()
        return batch

    def state(self) -> dict[str, Any]:
        """The place after the batch that was taken last."""
        return self._place

    def close(self) -> None:
        """Stop the stream's threads."""
        self._batches.close()

    def _reopen(self) -> None:
        self._batches.close()
        self._batches = self._open()
        self._batches.restore(self._place)
