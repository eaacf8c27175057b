"""A row of a speculative batch, as the host sees it."""

import asyncio
from collections.abc import Sequence

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.requests import NewToken, Request
from looplm_jax.inference.speculation.result import SpeculativeResult
from looplm_jax.inference.speculation.screening import Reroute, Screen, ScreenedRow, Screening
from looplm_jax.inference.speculation.step import Verified
from looplm_jax.inference.stopping import Finish, StopMatcher
from looplm_jax.inference.under_way import RequestError


class Row:
    """Takes what the rounds give, until the row ends; counts what it cost."""

    def __init__(self, index: int, request: Request, loops: int, tokenizer: Tokenizer | None = None):
        self.request = request
        self.index = index
        self.passes = 0
        self._loops = loops
        self._matcher = StopMatcher(request.stop_conditions, tokenizer, request.prompt_ids)
        self._tokens: list[int] = []
        self._log_probs: list[float] = []
        self._drafted = self._accepted = 0
        self._text: list[str] = []
        self._error = ""
        self._screened = False

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._matcher.finish is not None

    @property
    def left(self) -> int:
        """Tokens that may yet come."""
        return self.request.max_new_tokens - len(self._tokens)

    def screen(self, screen: Screen, drafts: Sequence[int], vocab_size: int) -> tuple[int, ...]:
        """What the screen puts in the place of the drafts, if anything; it may also end the row."""
        row = ScreenedRow(index=self.index, prompt_ids=self.request.prompt_ids, tokens=tuple(self._tokens))
        try:
            verdict = screen(row, tuple(drafts[: self.left]))
            if isinstance(verdict, Reroute):
                return _checked(verdict.tokens, vocab_size)[: self.left]
            if Screening(verdict) is Screening.STOP:
                self._screened = True
                self._text.append(self._matcher.close(Finish.STOP))
        except (Exception, asyncio.CancelledError) as error:  # of this row's screen: the other rows continue
            self._fail(str(RequestError("screen", error)))
        return ()

    def verify(self, verified: Verified) -> None:
        """What became of its drafts."""
        self._drafted += min(verified.tokens.size, self.left)
        before = len(self._tokens)
        self.extend(verified)
        self._accepted += min(int(verified.accepted), len(self._tokens) - before)

    def extend(self, verified: Verified) -> None:
        """More tokens, as far as the text goes on."""
        count = int(verified.counts)
        for token, log_prob in zip(verified.tokens[:count].tolist(), verified.log_probs[:count].tolist(), strict=True):
            if self.done:
                return
            self._tokens.append(token)
            self._log_probs.append(log_prob)
            self._text.append(self._matcher.push(token))
            self._tell(NewToken(token=token, exit_loop=self._loops, log_prob=log_prob, text=self._text[-1]))
        if verified.failed and not self.done:
            self._fail("logits were not finite; the parameters are damaged, or overflow")

    def result(self) -> SpeculativeResult:
        """What came of the prompt; only when it has ended."""
        assert self._matcher.finish is not None
        return SpeculativeResult(
            prompt_ids=self.request.prompt_ids,
            tokens=tuple(self._tokens),
            log_probs=tuple(self._log_probs),
            text="".join(self._text),
            finish=Finish.FAILED if self._error else self._matcher.finish,
            screened=self._screened,
            error=self._error,
            sampling=self.request.sampling,
            loops=self._loops,
            drafted=self._drafted,
            accepted=self._accepted,
            passes=self.passes,
        )

    def _tell(self, new: NewToken) -> None:
        """Give a token on to the owner of the row."""
        try:
            if self.request.on_token is not None:
                self.request.on_token(new)
        except (Exception, asyncio.CancelledError) as error:  # of this row's callback: the other rows continue
            self._fail(str(RequestError("on_token", error)))

    def _fail(self, error: str) -> None:
        self._error = error
        self._text.append(self._matcher.close(Finish.FAILED))


def _checked(tokens: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"token {outside[0]} of the reroute is not in the vocabulary of {vocab_size} tokens")
    return tokens
