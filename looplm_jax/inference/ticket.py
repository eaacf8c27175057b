"""A request on its way through the engine, as its owner sees it."""

import asyncio
import concurrent.futures
import queue
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

from looplm_jax.inference.requests import NewToken, Request, Result


class Ticket:
    """Wait for the result, or take its tokens as they come; from any thread, and with `await` or `async for` too."""

    def __init__(self, request: Request):
        self.request = request
        self._tokens: queue.SimpleQueue[NewToken | None] = queue.SimpleQueue()
        self._future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._cancelled = False
        self._provisional: int | None = None

    @property
    def provisional(self) -> int | None:
        """The likeliest next token by the loops it has done so far, to be revised; None without previews."""
        return self._provisional

    @property
    def done(self) -> bool:
        """Whether there is a result."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        """Whether its owner has lost interest."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask for an early end; the result then has the tokens so far."""
        self._cancelled = True

    def result(self, timeout: float | None = None) -> Result:
        """The result, once it is there; the engine must be stepped by somebody meanwhile."""
        return self._future.result(timeout)

    def ready(self) -> Iterator[NewToken]:
        """The tokens that are there and were not taken yet; does not wait."""
        while not self._tokens.empty():
            new = self._tokens.get()
            if new is not None:
                yield new

    def tokens(self) -> Iterator[NewToken]:
        """All tokens as they come, until the end."""
        while (new := self._tokens.get()) is not None:
            yield new

    async def __aiter__(self) -> AsyncIterator[NewToken]:
        """All tokens as they come, without holding up the event loop."""
        while (new := await asyncio.to_thread(self._tokens.get)) is not None:
            yield new

    def __await__(self) -> Generator[Any, None, Result]:
        """The result."""
        return asyncio.wrap_future(self._future).__await__()

    def propose(self, token: int) -> None:
        """For the engine: what the next token would be, were it to leave now."""
        self._provisional = token

    def give(self, new: NewToken) -> None:
        """For the engine: one more token."""
        self._provisional = None
        self._tokens.put(new)

    def finish(self, result: Result) -> None:
        """For the engine: nothing follows."""
        self._future.set_result(result)
        self._tokens.put(None)
