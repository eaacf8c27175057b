"""A request on its way through the engine, as its owner sees it."""

import asyncio
import concurrent.futures
import functools
import queue
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from looplm_jax.inference.requests import NewToken, Request, Result


class Ticket:
    """Wait for the result, or take its tokens as they come; from any thread, and with `await` or `async for` too.

    Whoever gives up cancels the request: a task that is cancelled while it awaits (`asyncio.wait_for` does that when
    its time is over), and a loop over the tokens that is left before their end. `asyncio.shield(ticket)` prevents it.
    A `result(timeout)` that runs out does not: call `cancel`, or wait again.
    """

    def __init__(
        self,
        request: Request,
        on_cancel: Callable[["Ticket"], None] | None = None,
        raised: list[BaseException] | None = None,
    ):
        self.request = request
        self.raised = [] if raised is None else raised  # by `on_token`, to end more than its request
        self._on_cancel = on_cancel
        self._tokens: queue.SimpleQueue[NewToken | None] = queue.SimpleQueue()
        self._arrivals: list[Callable[[], None]] = []
        self._future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        self._future.set_running_or_notify_cancel()  # nobody but the engine ends it
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
        """Ask for an early end; the result then has the tokens so far. May be called from a signal handler."""
        if self._cancelled or self.done:
            return
        self._cancelled = True
        if self._on_cancel is not None:
            self._on_cancel(self)

    def result(self, timeout: float | None = None) -> Result:
        """The result, once it is there; the engine must be stepped by somebody meanwhile."""
        return self._future.result(timeout)

    def ready(self) -> Iterator[NewToken]:
        """The tokens that are there and were not taken yet; does not wait."""
        while True:
            try:
                new = self._tokens.get_nowait()
            except queue.Empty:
                return
            if new is None:
                self._tokens.put(None)  # the end is for all who wait
                return
            yield new

    def tokens(self) -> Iterator[NewToken]:
        """All tokens as they come, until the end."""
        try:
            while (new := self._tokens.get()) is not None:
                yield new
            self._tokens.put(None)
        except BaseException:
            self.cancel()
            raise

    async def __aiter__(self) -> AsyncIterator[NewToken]:
        """All tokens as they come, without holding up the event loop."""
        arrived = asyncio.Event()
        notify = functools.partial(_set_from_any_thread, asyncio.get_running_loop(), arrived)
        self._arrivals.append(notify)
        try:
            ended = False
            while not ended:
                arrived.clear()
                ended = self.done  # asked before the tokens are taken, so that none is left behind
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
        """The result."""
        try:
            return (yield from asyncio.wrap_future(self._future).__await__())
        except BaseException:
            self.cancel()
            raise

    def propose(self, token: int) -> None:
        """For the engine: what the next token would be, were it to leave now."""
        self._provisional = token

    def give(self, new: NewToken) -> None:
        """For the engine: one more token."""
        self._provisional = None
        self._tokens.put(new)
        self._notify()

    def finish(self, result: Result) -> None:
        """For the engine: nothing follows."""
        self._future.set_result(result)
        self._tokens.put(None)
        self._notify()

    def _notify(self) -> None:
        for notify in tuple(self._arrivals):
            notify()


def _set_from_any_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    try:
        loop.call_soon_threadsafe(event.set)
    except RuntimeError:  # the loop was closed meanwhile: nobody waits there any more
        return
