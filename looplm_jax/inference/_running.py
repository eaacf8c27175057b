"""A running request: the handle of its caller, and the host state of the engine."""

import asyncio
import concurrent.futures
import functools
import queue
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.inference._kv_cache import Cache
from looplm_jax.inference._requests import CachedTurn, NewToken, PrefixCache, Request, Result
from looplm_jax.inference._stopping import Finish, StopMatcher
from looplm_jax.terminal import one_line

# The handle


class RequestHandle:
    """The handle of a submitted request: waits for its result, yields its tokens as they arrive, or cancels it.

        with engine.serving():
            handle = engine.submit(request)
            for new in handle.tokens():
                print(new.text, end="")
            result = handle.result()

    It works from any thread, and with `await` and `async for`. Giving up cancels the request: cancelling a task that
    awaits the handle (as `asyncio.wait_for` does on a timeout), or leaving a loop over the tokens early.
    `asyncio.shield(handle)` prevents this. A `result(timeout)` that times out does not cancel: call `cancel`, or wait
    again.
    """

    def __init__(
        self,
        request: Request,
        on_cancel: Callable[["RequestHandle"], None] | None = None,
        raised: list[BaseException] | None = None,
    ):
        self.request = request
        self.raised = [] if raised is None else raised  # exceptions of `on_token` that end more than its request
        self._on_cancel = on_cancel
        # The engine puts tokens in from its thread; any number of readers take them out. None marks the end.
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
        # Called from a signal handler, so it takes no lock.
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
        # Tokens arrive in the thread of the engine, and an event of asyncio may be set only in its own.
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

    def deliver(self, new: NewToken) -> None:
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


# The state


class RequestError(Exception):
    """An error in something that belongs to one request, as one line: `who raised Type: text`."""

    def __init__(self, who: str, error: BaseException):
        super().__init__(f"{who} raised {described(error)}")


def described(error: BaseException) -> str:
    """Returns `Type: text` of an error, in one line."""
    return one_line(f"{type(error).__name__}: {error}")


class RunningRequest:
    """The host state of a running request: passes tokens and their text to the handle until the request ends."""

    def __init__(self, handle: RequestHandle, tokenizer: Tokenizer | None):
        request = handle.request
        self.handle = handle
        self._matcher = StopMatcher(request.stop_conditions, tokenizer, request.prompt_ids)
        self._new_tokens: list[NewToken] = []
        self._text: list[str] = []
        self._previews: list[int] = []

    @property
    def needs_ticks(self) -> bool:
        """Whether tokens may follow the first one, which is sampled when the prompt has been run."""
        return self.handle.request.max_new_tokens > 1

    @property
    def tokens_in_cache(self) -> int:
        """Returns the number of tokens in the cache: prefix cache, prompt, and all new tokens except the last."""
        return sum(map(len, self._history)) + len(self._turn())

    def preview(self, token: int) -> None:
        """Records the most probable token after one more loop of the running token."""
        self._previews.append(token)
        self.handle.propose(token)

    def push(self, token: int, exit_loop: int, log_prob: float, exit_log_prob: float) -> Finish | None:
        """Delivers one more token. Returns the reason if it ends the request.

        Raises:
          RequestError: the tokenizer or the request's callback raised. This request cannot continue; the others can.
        """
        try:
            text = self._matcher.push(token)
        except BaseException as error:  # `tokenizers` panics with a BaseException
            raise RequestError("the tokenizer", error) from error

        previews, self._previews = tuple(self._previews), []
        new = NewToken(
            token=token,
            exit_loop=exit_loop,
            log_prob=log_prob,
            exit_log_prob=exit_log_prob,
            text=text,
            previews=previews,
        )
        self._new_tokens.append(new)
        self._text.append(text)
        self.handle.deliver(new)

        if self.handle.request.on_token is not None:
            try:
                self.handle.request.on_token(new)
            except BaseException as error:
                # These are meant for the whole process, so the caller of the engine raises them.
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    self.handle.raised.append(error)
                raise RequestError("on_token", error) from error

        return self._matcher.finish

    def end(self, finish: Finish, keep: Callable[[int], Cache] | None = None, error: str = "") -> None:
        """Delivers the result, even if a step on the way fails.

        `keep` returns the cache to keep, for a number of tokens.
        """
        request, cache = self.handle.request, None
        try:
            self._text.append(self._matcher.close(finish))
        except BaseException as failure:
            finish, error = Finish.FAILED, error or str(RequestError("the tokenizer", failure))

        try:
            if request.keep_cache and keep is not None and finish is not Finish.FAILED:
                cache = PrefixCache(row=keep(self.tokens_in_cache), turns=(*self._history, self._turn()))
        # Without its cache the result would not be what was requested, so the request fails.
        except Exception as failure:
            finish, error = Finish.FAILED, str(RequestError("keeping the cache", failure))

        self.handle.finish(
            Result(
                prompt_ids=request.prompt_ids,
                tokens=tuple(new.token for new in self._new_tokens),
                exit_loops=tuple(new.exit_loop for new in self._new_tokens),
                log_probs=tuple(new.log_prob for new in self._new_tokens),
                exit_log_probs=tuple(new.exit_log_prob for new in self._new_tokens),
                text="".join(self._text),
                finish=finish,
                error=error,
                sampling=request.sampling,
                history=self._history,
                cache=cache,
            )
        )

    @property
    def _history(self) -> tuple[CachedTurn, ...]:
        """Returns the turns that the request continues."""
        past = self.handle.request.past
        return () if past is None else past.turns

    def _turn(self) -> CachedTurn:
        """Returns the turn that the request added to the cache."""
        return CachedTurn(
            prompt_ids=self.handle.request.prompt_ids,
            # The last token was never read into the cache.
            tokens=tuple(new.token for new in self._new_tokens[:-1]),
            depths=tuple(new.exit_loop for new in self._new_tokens[1:]),
        )
