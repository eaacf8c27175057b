"""A request in a slot, as the host sees it: its tokens so far, its text, and how it ends."""

from collections.abc import Callable

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.inference.kept_cache import KeptCache, Turn
from looplm_jax.inference.kv_cache import Cache
from looplm_jax.inference.requests import NewToken, Result
from looplm_jax.inference.stopping import Finish, StopMatcher
from looplm_jax.inference.ticket import Ticket
from looplm_jax.printing import one_line


class RequestError(Exception):
    """What belongs to one request raised: `who raised Type: text`, in one line."""

    def __init__(self, who: str, error: BaseException):
        super().__init__(f"{who} raised {described(error)}")


def described(error: BaseException) -> str:
    """Returns `Type: text` of an error, in one line."""
    return one_line(f"{type(error).__name__}: {error}")


class UnderWay:
    """Takes the tokens of one ticket and gives them on, with their text, until the request ends."""

    def __init__(self, ticket: Ticket, tokenizer: Tokenizer | None):
        request = ticket.request
        self.ticket = ticket
        self._matcher = StopMatcher(request.stop_conditions, tokenizer, request.prompt_ids)
        self._made: list[NewToken] = []
        self._text: list[str] = []
        self._previews: list[int] = []

    @property
    def tokens_in_cache(self) -> int:
        """Tokens of the prompt (what it went on from included) and all new ones but the last."""
        return sum(map(len, self._history)) + len(self._turn())

    def preview(self, token: int) -> None:
        """The likeliest token after one more loop of the token under way."""
        self._previews.append(token)
        self.ticket.propose(token)

    def push(self, token: int, exit_loop: int, log_prob: float) -> Finish | None:
        """One more token, given on to the owner; what it ends the request with, if it does.

        Raises:
          RequestError: the tokenizer or the owner's callback raised. The request cannot go on; the others can.
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
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    self.ticket.raised.append(error)
                raise RequestError("on_token", error) from error
        return self._matcher.finish

    def end(self, finish: Finish, keep: Callable[[int], Cache] | None = None, error: str = "") -> None:
        """The result, whatever fails on the way. `keep` makes the cache to be kept, of so many tokens."""
        request, cache = self.ticket.request, None
        try:
            self._text.append(self._matcher.close(finish))
        except BaseException as failure:
            finish, error = Finish.FAILED, error or str(RequestError("the tokenizer", failure))
        try:
            if request.keep_cache and keep is not None and finish is not Finish.FAILED:
                cache = KeptCache(row=keep(self.tokens_in_cache), turns=(*self._history, self._turn()))
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
        past = self.ticket.request.past
        return () if past is None else past.turns

    def _turn(self) -> Turn:
        """What the request has added to the cache."""
        return Turn(
            prompt_ids=self.ticket.request.prompt_ids,
            tokens=tuple(new.token for new in self._made[:-1]),
            depths=tuple(new.exit_loop for new in self._made[1:]),
        )
