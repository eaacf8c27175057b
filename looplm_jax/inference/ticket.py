"""The request handle: a request in the engine, from the caller's point of view."""

import asyncio
import concurrent.futures
import functools
import queue
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from looplm_jax.inference.requests import NewToken, Request, Result


class Ticket:
    """A handle that waits for the result, or yields its tokens as they arrive.

    It works from any thread, and with `await` and `async for`. Giving up cancels the request: cancelling a task that
    awaits the handle (as `asyncio.wait_for` does on a timeout), or leaving a loop over the tokens early.
    `asyncio.shield(ticket)` prevents this. A `result(timeout)` that times out does not cancel: call `cancel`, or wait
    again.
    """

    def __init__(
        self,
        request: Request,
        on_cancel: Callable[["Ticket"], None] | None = None,
        raised: list[BaseException] | None = None,
    ):
        self.request = request
        self.raised = [] if raised is None else raised  # exceptions of `on_token` that end more than its request
        self._on_cancel = on_cancel
        self._tokens: queue.SimpleQueue[NewToken | None] = queue.SimpleQueue()
        self._arrivals: list[Callable[[], None]] = []
        self._future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._future.set_running_or_notify_cancel()  # only the engine completes it
        self._cancelled = False
        self._provisional: int | None = None

    @property
    def provisional(self) -> int | None:
        """Returns the most probable next token after the loops so far, which may change; None without previews."""
        return self._provisional

    @property
    def done(self) -> bool:
        """Whether the result is available."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        """Whether the caller has canceled the request."""
        return self._cancelled

    def cancel(self) -> None:
        """Requests an early end; the result then has the tokens so far. May be called from a signal handler."""
        if self._cancelled or self.done:
            return
        self._cancelled = True
        if self._on_cancel is not None:
            self._on_cancel(self)

    def result(self, timeout: float | None = None) -> Result:
        """Returns the result, waiting for it. The engine must be stepped elsewhere in the meantime."""
        return self._future.result(timeout)

    def ready(self) -> Iterator[NewToken]:
        """Yields the tokens that have arrived and were not taken yet, without waiting."""
        while True:
            try:
                new = self._tokens.get_nowait()
            except queue.Empty:
                return
            if new is None:
                self._tokens.put(None)  # every waiting reader must see the end
                return
            yield new

    def tokens(self) -> Iterator[NewToken]:
        """Yields all tokens as they arrive, until the end."""
        try:
            while (new := self._tokens.get()) is not None:
                yield new
            # Put back, so that other readers see the end as well.
            self._tokens.put(None)
        except BaseException:
            self.cancel()
            raise

    async def __aiter__(self) -> AsyncIterator[NewToken]:
        """Yields all tokens as they arrive, without blocking the event loop."""
        arrived = asyncio.Event()
        notify = functools.partial(_set_from_any_thread, asyncio.get_running_loop(), arrived)
        self._arrivals.append(notify)
        try:
            ended = False
            while not ended:
                arrived.clear()
                ended = self.done  # read before the tokens are taken, so that none is missed
                for new in self.ready():
                    yield new
                if not ended:
                    await arrived.wait()
        except BaseException:
            self.cancel()
            raise
        finally:
            self._arrivals.remove(notify)

    def __await__(self) -> Generator[Any, None, Result]:
        """Returns the result."""
        try:
            return (yield from asyncio.wrap_future(self._future).__await__())
        except BaseException:
            self.cancel()
            raise

    def propose(self, token: int) -> None:
        """Called by the engine: sets the token that would be chosen if the running one exited now."""
        self._provisional = token

    def give(self, new: NewToken) -> None:
        """Called by the engine: delivers a token."""
        # It was for this token.
        self._provisional = None
        self._tokens.put(new)
        self._notify()

    def finish(self, result: Result) -> None:
        """Called by the engine: delivers the result, after all tokens."""
        # Before the end marker: a reader that sees the end may ask for the result.
        self._future.set_result(result)
        self._tokens.put(None)
        self._notify()

    def _notify(self) -> None:
        """Wakes up all waiting event loops."""
        for notify in tuple(self._arrivals):
            notify()


def _set_from_any_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Sets an event of an event loop, unless the loop is closed."""
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:  # the loop was closed in the meantime, so nothing waits there
        return
