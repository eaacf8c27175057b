"""Requests to the engine, their results, and the prefix cache by which one request continues another."""

import dataclasses
import inspect
import math
from collections.abc import Callable

from jaxtyping import Array, Int

from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference._field_checks import real_number, token_ids, truth
from looplm_jax.inference._kv_cache import Cache
from looplm_jax.inference._sampling import Sampling
from looplm_jax.inference._stopping import Finish, StopConditions

# Prefix cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedTurn:
    """A prompt and the tokens that followed it, in a prefix cache.

    The prompt ran all loops, and saw earlier tokens through the planes that the cache keeps. The last token of an
    answer is in no cache: it is not part of this turn, but of the next prompt, if there is one.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    depths: tuple[int, ...]  # loops that each of `tokens` ran itself: the exit loop of the token after it

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PrefixCache:
    """The cache row of a finished request, and the turns in it, for a request that continues them.

        first = engine.generate(["Once"], max_new_tokens=64, keep_cache=True)[0]
        second = engine.generate([[*first.tokens[-1:], *more]], max_new_tokens=64, past=first.cache)[0]

    The last token of a result is not in its cache, so the next prompt starts with it. A prefix cache belongs to engines
    with the same model, loops, cache strategy and mesh, and may be continued any number of times. `Conversation` does
    all this for a chat.
    """

    row: Cache = dataclasses.field(repr=False)
    turns: tuple[CachedTurn, ...]

    def __len__(self) -> int:
        """Returns the number of tokens in the cache."""
        return sum(map(len, self.turns))

    @property
    def lengths(self) -> Int[Array, "1"]:
        """Returns the number of tokens in the row, as counted on the device."""
        return self.row.lengths

    @property
    def tokens(self) -> tuple[int, ...]:
        """Returns all tokens, in order."""
        return tuple(token for turn in self.turns for token in (*turn.prompt_ids, *turn.tokens))


# Requests


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewToken:
    """A token, the loop whose logits it was chosen from, and its log-probability there at temperature 1, in nats.

    `exit_log_prob` is the log-probability of the loop in the exit distribution of the gate, whatever the policy. `text`
    is the text that became final with the token; `previews` are the most probable tokens after each of its loops, if
    requested.
    """

    token: int
    exit_loop: int
    log_prob: float
    exit_log_prob: float = math.nan  # unknown in speculation, which runs all loops
    text: str = ""
    previews: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt, and how to continue it, for `Engine.submit`.

    `Engine.requests` creates requests from texts. Fields are described in `Engine.generate`. `past` is the prefix cache
    of an earlier request, which `prompt_ids` continue; its own tokens are not repeated.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    policy: ExitPolicy | None = None  # None: the trained depth
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    loops_per_token: float = math.inf  # budget: mean over new tokens after the first, which comes from the prompt
    milliseconds_per_token: float = math.inf  # budget: loops are reduced to meet it
    client: str = ""  # clients take turns in the queue
    keep_cache: bool = False
    past: PrefixCache | None = None
    on_token: Callable[[NewToken], None] | None = None

    def __post_init__(self) -> None:
        self._set("prompt_ids", token_ids("prompt_ids", self.prompt_ids))

        if not self.prompt_ids:
            raise UserError("the prompt is empty; give at least one token")

        self._set("stop_ids", token_ids("stop_ids", self.stop_ids))

        conditions = self.stop_conditions  # raises for invalid conditions
        self._set("stop_strings", conditions.stop_strings)
        self._set("max_new_tokens", conditions.max_new_tokens)

        self._set("loops_per_token", real_number("loops_per_token", self.loops_per_token))
        if not self.loops_per_token >= 1:
            raise UserError(f"loops_per_token must be at least 1, not {self.loops_per_token:g}")

        self._set("milliseconds_per_token", real_number("milliseconds_per_token", self.milliseconds_per_token))
        if not self.milliseconds_per_token > 0:
            raise UserError(f"milliseconds_per_token must be positive, not {self.milliseconds_per_token:g}")

        self._set("keep_cache", truth("keep_cache", self.keep_cache))
        self._check_objects()

    def _check_objects(self) -> None:
        """Raises UserError for fields of wrong types."""
        if not isinstance(self.sampling, Sampling):
            raise UserError(f"sampling must be a Sampling, such as Sampling(temperature=1.0), not {self.sampling!r}")
        if self.policy is not None and (isinstance(self.policy, type) or not isinstance(self.policy, ExitPolicy)):
            raise UserError(f"policy must be an exit policy, such as QExit(q=0.5), not {self.policy!r}")
        if not isinstance(self.client, str):
            raise UserError(f"client must be a name, not {self.client!r}")

        if not isinstance(self.past, PrefixCache | None):
            raise UserError(f"past must be the cache of a Result, not {type(self.past).__name__}")

        if self.on_token is not None and not callable(self.on_token):
            raise UserError(f"on_token must be a function, not {self.on_token!r}")
        # Calling it would only create a coroutine.
        if inspect.iscoroutinefunction(self.on_token):
            raise UserError("on_token is an async function, which would never run; use `async for new in handle`")

    def _set(self, name: str, value: object) -> None:
        """Sets a field of the frozen dataclass to its normalized value."""
        object.__setattr__(self, name, value)

    @property
    def tokens_before(self) -> int:
        """Returns the number of tokens in the prefix cache that it continues."""
        return 0 if self.past is None else len(self.past)

    @property
    def max_tokens(self) -> int:
        """Returns the maximum number of tokens in total: the prefix cache, the prompt, and all new tokens."""
        # The last new token is never read, but counted: it may be the first token of the next turn.
        return self.tokens_before + len(self.prompt_ids) + self.max_new_tokens

    @property
    def stop_conditions(self) -> StopConditions:
        """Returns the conditions that end its text."""
        return StopConditions(
            stop_ids=frozenset(self.stop_ids), stop_strings=self.stop_strings, max_new_tokens=self.max_new_tokens
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The new tokens of a request, and all that `replay` needs. A stop token is included as the last one.

    Fields about tokens have one entry per token, with the names of `NewToken`.
    """

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    exit_loops: tuple[int, ...]
    log_probs: tuple[float, ...]
    text: str
    finish: Finish
    error: str = ""
    # The settings of the request; with them, it is answered in the same way.
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    exit_log_probs: tuple[float, ...] = ()  # of the exit loops in the exit distribution, nats
    history: tuple[CachedTurn, ...] = ()  # the turns that the request continued
    cache: PrefixCache | None = dataclasses.field(default=None, repr=False)  # if kept; all tokens but the last

    @property
    def mean_loops(self) -> float:
        """Returns the mean loops per token; 0 if there are none."""
        return sum(self.exit_loops) / len(self.exit_loops) if self.exit_loops else 0.0
