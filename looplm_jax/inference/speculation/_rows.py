"""The rows of a speculative batch on the host: screens of their drafts, their state, and their results."""

import asyncio
import dataclasses
import enum
from collections.abc import Callable, Sequence

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference._requests import NewToken, Request
from looplm_jax.inference._running import RequestError
from looplm_jax.inference._sampling import Sampling
from looplm_jax.inference._stopping import Finish, StopMatcher
from looplm_jax.inference.speculation._verify import Verified

# Screens


class Screening(enum.Enum):
    """The decision about the drafts of a row."""

    CONTINUE = "continue"  # verify them
    STOP = "stop"  # drop them, and end the row


@dataclasses.dataclass(frozen=True)
class Reroute:
    """Tokens to use instead of the drafts. They are emitted unchanged, and the row continues from them."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not self.tokens:
            raise UserError("a reroute needs at least one token; use Screening.STOP to end the row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreenedRow:
    """The row of the drafts: its index in the batch, its prompt, and the tokens emitted so far."""

    index: int
    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]


Screen = Callable[[ScreenedRow, tuple[int, ...]], Screening | Reroute]


# Results


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeResult:
    """The new tokens of a prompt; a stop token is included as the last one.

    `finish` is also STOP if a screen ended the row; see `screened`. Log-probabilities are those of loop T at
    temperature 1, from the raw logits, in nats.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str  # without the stop string and what follows it; empty without a tokenizer
    finish: Finish
    screened: bool = False  # whether a screen ended the row
    error: str = ""
    sampling: Sampling = dataclasses.field(default_factory=Sampling)  # the settings of the row
    loops: int  # T
    drafted: int  # verified drafts, not counting those beyond the last requested token
    accepted: int  # drafts that became tokens
    passes: int  # sequential passes of the stack, each over one or several tokens of this row

    @property
    def acceptance_rate(self) -> float:
        """Returns the fraction of drafts that became tokens; 0 if there were no drafts."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def loops_per_token(self) -> float:
        """Returns sequential passes of the stack per token: T without speculation; 0 if there is no token."""
        return self.passes / len(self.tokens) if self.tokens else 0.0


# Rows


class Row:
    """The host state of one row: collects its tokens until it ends, and counts the cost."""

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
        """Whether the row has ended."""
        return self._matcher.finish is not None

    @property
    def left(self) -> int:
        """Returns the number of tokens that may follow."""
        return self.request.max_new_tokens - len(self._tokens)

    def screen(self, screen: Screen, drafts: Sequence[int], vocab_size: int) -> tuple[int, ...]:
        """Returns the tokens that the screen substitutes for the drafts, if any. The screen may also end the row."""
        row = ScreenedRow(index=self.index, prompt_ids=self.request.prompt_ids, tokens=tuple(self._tokens))
        try:
            # Drafts beyond the requested length would never be emitted.
            verdict = screen(row, tuple(drafts[: self.left]))
            if isinstance(verdict, Reroute):
                return _checked(verdict.tokens, vocab_size)[: self.left]
            if Screening(verdict) is Screening.STOP:
                self._screened = True
                self._text.append(self._matcher.close(Finish.STOP))
        except (Exception, asyncio.CancelledError) as error:  # an error of this row's screen; the other rows continue
            self._fail(str(RequestError("screen", error)))
        return ()

    def verify(self, verified: Verified) -> None:
        """Records the outcome of the row's drafts."""
        self._drafted += min(verified.tokens.size, self.left)
        before = len(self._tokens)
        self.extend(verified)
        # An ended text drops tokens, so not every accepted draft becomes a token.
        self._accepted += min(int(verified.accepted), len(self._tokens) - before)

    def extend(self, verified: Verified) -> None:
        """Appends tokens until the text ends."""
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
        """Returns the result of the row, which must have ended."""
        assert self._matcher.finish is not None
        return SpeculativeResult(
            prompt_ids=self.request.prompt_ids,
            tokens=tuple(self._tokens),
            log_probs=tuple(self._log_probs),
            text="".join(self._text),
            # A callback may fail after the text has ended.
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
        """Passes a token to the callback of the row."""
        try:
            if self.request.on_token is not None:
                self.request.on_token(new)
        except (Exception, asyncio.CancelledError) as error:  # an error of this row's callback; the other rows continue
            self._fail(str(RequestError("on_token", error)))

    def _fail(self, error: str) -> None:
        """Ends the row with an error."""
        self._error = error
        self._text.append(self._matcher.close(Finish.FAILED))


def _checked(tokens: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens of a reroute. Raises UserError if one is not in the vocabulary."""
    outside = [token for token in tokens if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"token {outside[0]} of the reroute is not in the vocabulary of {vocab_size} tokens")
    return tokens
