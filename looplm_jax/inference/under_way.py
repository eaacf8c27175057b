"""A running request on the host: its tokens so far, its text, and how it ends."""

from collections.abc import Callable

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.inference.kept_cache import KeptCache, Turn
from looplm_jax.inference.kv_cache import Cache
from looplm_jax.inference.requests import NewToken, Result
from looplm_jax.inference.stopping import Finish, StopMatcher
from looplm_jax.inference.ticket import Ticket
from looplm_jax.terminal import one_line


class RequestError(Exception):
    """An error in something that belongs to one request, as one line: `who raised Type: text`."""

    def __init__(self, who: str, error: BaseException):
        super().__init__(f"{who} raised {described(error)}")


def described(error: BaseException) -> str:
    """Returns `Type: text` of an error, in one line."""
    return one_line(f"{type(error).__name__}: {error}")


class UnderWay:
    """The host state of a running request: passes tokens and their text to the handle until the request ends."""

    def __init__(self, ticket: Ticket, tokenizer: Tokenizer | None):
        request = ticket.request
        self.ticket = ticket
        self._matcher = StopMatcher(request.stop_conditions, tokenizer, request.prompt_ids)
        self._made: list[NewToken] = []
        self._text: list[str] = []
        self._previews: list[int] = []

    @property
    def needs_ticks(self) -> bool:
        """Whether tokens may follow the first one, which is sampled when the prompt has been run."""
        return self.ticket.request.max_new_tokens > 1

    @property
    def tokens_in_cache(self) -> int:
        """Returns the number of tokens in the cache: prefix cache, prompt, and all new tokens except the last."""
        return sum(map(len, self._history)) + len(self._turn())

    def preview(self, token: int) -> None:
        """Records the most probable token after one more loop of the running token."""
        self._previews.append(token)
        self.ticket.propose(token)

    def push(self, token: int, exit_loop: int, log_prob: float) -> Finish | None:
        """Delivers one more token. Returns the reason if it ends the request.

        Raises:
          RequestError: the tokenizer or the request's callback raised. This request cannot continue; the others can.
        """
        try:
            text = self._matcher.push(token)
        except BaseException as error:  # `tokenizers` panics with a BaseException
            raise RequestError("the tokenizer", error) from error

        previews, self._previews = tuple(self._previews), []
        new = NewToken(token=token, exit_loop=exit_loop, log_prob=log_prob, text=text, previews=previews)
        self._made.append(new)
        self._text.append(text)
        self.ticket.give(new)

        if self.ticket.request.on_token is not None:
            try:
                self.ticket.request.on_token(new)
            except BaseException as error:
                # These are meant for the whole process, so the caller of the engine raises them.
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    self.ticket.raised.append(error)
                raise RequestError("on_token", error) from error

        return self._matcher.finish

    def end(self, finish: Finish, keep: Callable[[int], Cache] | None = None, error: str = "") -> None:
        """Delivers the result, even if a step on the way fails.

        `keep` returns the cache to keep, for a number of tokens.
        """
        request, cache = self.ticket.request, None
        try:
            self._text.append(self._matcher.close(finish))
        except BaseException as failure:
            finish, error = Finish.FAILED, error or str(RequestError("the tokenizer", failure))

        try:
            if request.keep_cache and keep is not None and finish is not Finish.FAILED:
                cache = KeptCache(row=keep(self.tokens_in_cache), turns=(*self._history, self._turn()))
        # Without its cache the result would not be what was requested, so the request fails.
        except Exception as failure:
            finish, error = Finish.FAILED, str(RequestError("keeping the cache", failure))

        self.ticket.finish(
            Result(
                prompt_ids=request.prompt_ids,
                tokens=tuple(new.token for new in self._made),
                exit_loops=tuple(new.exit_loop for new in self._made),
                log_probs=tuple(new.log_prob for new in self._made),
                text="".join(self._text),
                finish=finish,
                error=error,
                sampling=request.sampling,
                history=self._history,
                cache=cache,
            )
        )

    @property
    def _history(self) -> tuple[Turn, ...]:
        """Returns the turns that the request continues."""
        past = self.ticket.request.past
        return () if past is None else past.turns

    def _turn(self) -> Turn:
        """Returns the turn that the request added to the cache."""
        return Turn(
            prompt_ids=self.ticket.request.prompt_ids,
            # The last token was never read into the cache.
            tokens=tuple(new.token for new in self._made[:-1]),
            depths=tuple(new.exit_loop for new in self._made[1:]),
        )
