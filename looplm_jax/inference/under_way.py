"""A request in a slot, as the host sees it: its tokens so far, its text, and how it ends."""

from collections.abc import Callable

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.inference.kv_cache import Cache
from looplm_jax.inference.requests import NewToken, Result
from looplm_jax.inference.stopping import Finish, StopMatcher
from looplm_jax.inference.ticket import Ticket


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
        request = self.ticket.request
        before = 0 if request.past is None else int(request.past.lengths[0])
        return before + len(request.prompt_ids) + max(len(self._made) - 1, 0)

    def preview(self, token: int) -> None:
        """The likeliest token after one more loop of the token under way."""
        self._previews.append(token)
        self.ticket.propose(token)

    def push(self, token: int, exit_loop: int, log_prob: float) -> Finish | None:
        """One more token, given on to the owner; what it ends the request with, if it does."""
        text = self._matcher.push(token)
        previews, self._previews = tuple(self._previews), []
        new = NewToken(token=token, exit_loop=exit_loop, log_prob=log_prob, text=text, previews=previews)
        self._made.append(new)
        self._text.append(text)
        self.ticket.give(new)
        if self.ticket.request.on_token is not None:
            self.ticket.request.on_token(new)
        return self._matcher.finish

    def end(self, finish: Finish, keep: Callable[[int], Cache] | None = None, error: str = "") -> None:
        """The result. `keep` makes the cache to be kept, of so many tokens."""
        self._text.append(self._matcher.close(finish))
        request = self.ticket.request
        wanted = request.keep_cache and keep is not None and finish is not Finish.FAILED
        self.ticket.finish(
            Result(
                prompt_ids=request.prompt_ids,
                tokens=tuple(new.token for new in self._made),
                exit_loops=tuple(new.exit_loop for new in self._made),
                log_probs=tuple(new.log_prob for new in self._made),
                text="".join(self._text),
                finish=finish,
                error=error,
                cache=keep(self.tokens_in_cache) if wanted and keep is not None else None,
            )
        )
