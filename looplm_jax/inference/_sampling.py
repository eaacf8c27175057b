"""Sampling: the next token from logits, greedy, or drawn at a temperature from the most probable tokens.

Nothing is sorted: the sets that `top_k` and `top_p` keep are found by bisection over the bits of the logits, 32 sums
over the vocabulary for each, and only if a row requests it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

from looplm_jax.errors import UserError
from looplm_jax.inference._field_checks import MOST, real_number, whole_number
from looplm_jax.random_keys import seeded_key

# Numbers that round to 0 or to infinity in float32 are refused, because programs compute in it.
_LARGEST = float(jnp.finfo(jnp.float32).max)
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
_SIGN_BIT = 31
# Folded into the key of a token for its exit; `speculation` folds in 1.
_EXIT_KEY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """The sampling settings of a request; greedy by default.

    They apply in the order repetition penalty, temperature, `top_k`, `top_p`, `min_p`; each step renormalizes what the
    step before it kept. Temperature 0 takes the most probable token after the penalty. Tokens exactly as probable as
    the last one that a filter keeps are kept too.

    Random draws depend only on `seed`, `index`, `sample` and the number of the token. `generate` and similar functions
    increment `index` and `sample` from the values here; `Result.sampling` has the values of a request.
    """

    temperature: float = 0.0  # logits are divided by it; 0 takes the most probable token
    top_k: int = 0  # keep the k most probable tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens whose probability reaches p; 1: all
    min_p: float = 0.0  # keep tokens at least min_p times as probable as the best; 0: all
    repetition_penalty: float = 1.0  # divides positive logits of tokens that occurred, and multiplies negative ones
    seed: int = 0
    index: int = 0  # number of the request among those with this seed: a prompt of a call, a turn of a chat
    sample: int = 0  # number of the sample of one prompt

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = real_number if field.type is float else whole_number
            # Ranges are checked below, with messages of their own.
            bounds = {} if field.type is float else {"least": -MOST - 1, "most": 2**63}
            object.__setattr__(self, field.name, check(field.name, getattr(self, field.name), **bounds))

        if not 0 <= self.temperature <= _LARGEST:
            raise UserError(f"temperature must not be negative, not {self.temperature}; 0 takes the likeliest token")
        if not 0 <= self.top_k <= MOST:
            raise UserError(f"top_k must not be negative, not {self.top_k}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}; 1 keeps all tokens")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be in [0, 1], not {self.min_p}; 0 keeps all tokens")
        if not _SMALLEST <= self.repetition_penalty <= _LARGEST:
            raise UserError(f"repetition_penalty must be positive, not {self.repetition_penalty}; 1 changes nothing")

        for name in ("seed", "index", "sample"):
            if not 0 <= getattr(self, name) <= MOST:
                raise UserError(f"{name} must be in 0..{MOST}, not {getattr(self, name)}")

    def numbered(self, index: int, sample: int = 0) -> "Sampling":
        """Returns the settings of request `index` of a call and sample `sample` of its prompt, with their own keys.

        Raises:
          UserError: a number exceeds int32.
        """
        return dataclasses.replace(self, index=self.index + index, sample=self.sample + sample)


@flax.struct.dataclass
class SamplingTable:
    """The `Sampling` of every slot, as arrays, so that other numbers compile nothing.

    Fields are those of `Sampling`, and `vocabulary`: ids from there on are never chosen.
    """

    temperature: Float[Array, "*N"]
    top_k: Int[Array, "*N"]
    top_p: Float[Array, "*N"]
    min_p: Float[Array, "*N"]
    repetition_penalty: Float[Array, "*N"]
    seed: Int[Array, "*N"]
    index: Int[Array, "*N"]
    sample: Int[Array, "*N"]
    vocabulary: Int[Array, "*N"]

    @classmethod
    def of(cls, sampling: "Sampling | SamplingTable", vocabulary: int = MOST) -> "SamplingTable":
        """Returns the numbers of one `Sampling`, without axes: traced, or NumPy numbers, which the caller transfers."""
        numbers: dict[str, Any] = {field.name: getattr(sampling, field.name) for field in dataclasses.fields(Sampling)}
        return cls(**{name: _column(name, number) for name, number in (numbers | {"vocabulary": vocabulary}).items()})

    @classmethod
    def of_all(cls, samplings: Sequence[Sampling], vocabulary: int = MOST) -> "SamplingTable":
        """Returns one row for each of several `Sampling`s, on the device."""
        columns = {
            field.name: [getattr(sampling, field.name) for sampling in samplings]
            for field in dataclasses.fields(Sampling)
        }
        columns["vocabulary"] = [vocabulary] * len(samplings)
        return jax.device_put(cls(**{name: _column(name, numbers) for name, numbers in columns.items()}))

    @classmethod
    def empty(cls, slots: int) -> "SamplingTable":
        """Returns a table of greedy slots."""
        # The default settings are greedy.
        return jax.tree.map(lambda number: jnp.full(slots, number), cls.of(Sampling()))

    def with_sampling(self, slot: int | Int[Array, ""], sampling: Sampling) -> "SamplingTable":
        """Returns the table with the settings of one slot replaced."""
        return _replace_row(self, slot, SamplingTable.of(sampling))


def _column(name: str, numbers: Any) -> Any:
    """Returns numbers as an array of the field's dtype. Numbers of the host stay on the host."""
    floats = {field.name for field in dataclasses.fields(Sampling) if field.type is float}
    asarray = jnp.asarray if isinstance(numbers, jax.Array) else np.asarray
    return asarray(numbers, np.float32 if name in floats else np.int32)


@jax.jit
def _replace_row(table: SamplingTable, slot: Int[Array, ""], row: SamplingTable) -> SamplingTable:
    """Returns the table with one row replaced."""
    return jax.tree.map(lambda column, number: column.at[slot].set(number), table, row)


@flax.struct.dataclass
class Choice:
    """Chosen tokens, and their log-probabilities at temperature 1 from the raw logits, before any penalty, in nats."""

    tokens: Int[Array, "N"]
    log_probs: Float[Array, "N"]


# Choosing tokens


def sample_rows(
    logits: Float[Array, "N V"],
    table: SamplingTable,
    counts: Int[Array, "N"],
    seen: Bool[Array, "N V"] | None = None,
) -> Choice:
    """Draws one token per row from its `probabilities`. If all rows are greedy, nothing is drawn or filtered.

    Args:
      logits: float32 logits of each row's next token.
      table: settings of each row.
      counts: the number of new tokens of each row so far. With `seed`, `index` and `sample` they determine the random
        key, so that the tokens of a request do not depend on its slot or on other slots.
      seen: tokens in the prompt or among the new tokens of each row; None if no row has a repetition penalty.
    """
    tokens = _draw(_allowed(logits, table, seen), table, jax.vmap(token_key)(table, counts))
    # The reported probability is that of the model, so it uses the raw logits.
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return Choice(tokens=tokens, log_probs=chosen - jax.nn.logsumexp(logits, axis=-1))


def likeliest(logits: Float[Array, "N V"], table: SamplingTable) -> Int[Array, "N"]:
    """Returns the most probable token of each row from the raw logits, among the ids that may be chosen."""
    return jnp.argmax(_in_vocabulary(logits, table), axis=-1).astype(jnp.int32)


def sample(
    logits: Float[Array, "V"],
    sampling: Sampling | SamplingTable,
    key: PRNGKeyArray,
    seen: Bool[Array, "V"] | None = None,
) -> Int[Array, ""]:
    """Draws one token of one row. Pure; the numbers of `sampling` may be traced."""
    row = SamplingTable.of(sampling)
    allowed = _allowed(logits, row, seen)[None]
    return _draw(allowed, jax.tree.map(lambda number: jnp.asarray(number)[None], row), key[None])[0]


def token_key(sampling: Sampling | SamplingTable, number: int | Int[Array, ""]) -> PRNGKeyArray:
    """Returns the key of new token `number`, counted from 0, of sample `sample` of request `index` under a seed."""
    # Folded in one after another, so that neighboring requests have unrelated keys.
    key = seeded_key(sampling.seed)
    for part in (sampling.index, sampling.sample, number):
        key = jax.random.fold_in(key, part)
    return key


def exit_draws(table: "SamplingTable", counts: Int[Array, "N"]) -> Float[Array, "N"]:
    """Returns a number per row, uniform in [0, 1), that decides the exit loop of new token `counts` if that is random.

    It depends on what the key of the token depends on, under a key of its own.
    """

    def draw(row: "SamplingTable", number: Int[Array, ""]) -> Float[Array, ""]:
        return jax.random.uniform(jax.random.fold_in(token_key(row, number), _EXIT_KEY))

    return jax.vmap(draw)(table, counts)


def probabilities(
    logits: Float[Array, "*N V"], sampling: Sampling | SamplingTable, seen: Bool[Array, "*N V"] | None = None
) -> Float[Array, "*N V"]:
    """Returns the distribution that tokens are drawn from, after penalty, temperature and filters.

    For greedy sampling all weight is on one token. The numbers of `sampling` broadcast against the leading axes of
    `logits`.
    """
    table = sampling if isinstance(sampling, SamplingTable) else SamplingTable.of(sampling)
    table = jax.tree.map(lambda number: jnp.broadcast_to(number, logits.shape[:-1]), table)
    return jax.nn.softmax(_cut(_allowed(logits, table, seen), table))


# Filters


def _draw(logits: Float[Array, "N V"], table: SamplingTable, keys: Key[Array, "N"]) -> Int[Array, "N"]:
    """Draws one token per row from the allowed logits."""

    def greedy() -> Int[Array, "N"]:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Int[Array, "N"]:
        return jax.vmap(jax.random.categorical)(keys, _cut(logits, table)).astype(jnp.int32)

    # One slot that samples is enough to take the slower branch.
    return jax.lax.cond(jnp.any(table.temperature > 0), draw, greedy)


def _allowed(
    logits: Float[Array, "*N V"], table: SamplingTable, seen: Bool[Array, "*N V"] | None
) -> Float[Array, "*N V"]:
    """Returns the logits of ids in the vocabulary after the repetition penalty, and minus infinity beyond it.

    The penalty is that of CTRL (arXiv 1909.05858, section 4.1), applied to logits as in Hugging Face.
    """
    if seen is not None:
        penalty = table.repetition_penalty[..., None]
        # Dividing a negative logit would raise it.
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    return _in_vocabulary(logits, table)


def _in_vocabulary(logits: Float[Array, "*N V"], table: SamplingTable) -> Float[Array, "*N V"]:
    """Returns the logits, with minus infinity for ids that may not be chosen."""
    return jnp.where(_ids(logits) < table.vocabulary[..., None], logits, -jnp.inf)


def _cut(logits: Float[Array, "*N V"], table: SamplingTable) -> Float[Array, "*N V"]:
    """Returns the log weights to draw from, 0 for the most probable token, minus infinity for excluded tokens."""
    scaled = _scaled(logits, table.temperature[..., None])
    # An unreachable weight keeps everything. So does p = 1, which float32 sums could reach before the last token.
    count = jnp.where(table.top_k > 0, table.top_k.astype(jnp.float32), jnp.inf)
    share = jnp.where(table.top_p < 1, jnp.maximum(table.top_p, jnp.finfo(jnp.float32).tiny), jnp.inf)
    # In this order: the probabilities of `top_p` are those of the tokens that `top_k` kept.
    scaled = _heaviest(scaled, jnp.ones_like, count)
    scaled = _heaviest(scaled, jax.nn.softmax, share)
    # Relative to the best token, whose log weight is 0; `min_p` = 0 has the logarithm minus infinity.
    return jnp.where(scaled >= jnp.log(table.min_p)[..., None], scaled, -jnp.inf)


def _scaled(logits: Float[Array, "*N V"], temperature: Float[Array, "*N 1"]) -> Float[Array, "*N V"]:
    """Returns the logits divided by the temperature, relative to the best one, which alone remains at temperature 0."""
    best = jnp.argmax(logits, axis=-1, keepdims=True)
    below = logits - jnp.take_along_axis(logits, best, axis=-1)  # at most 0, so that it cannot overflow to inf
    # Greedy: the log weights of a distribution on one token.
    one_hot = jnp.where(_ids(logits) == best, 0.0, -jnp.inf)
    return jnp.where(temperature > 0, below / temperature, one_hot)


def _heaviest(
    scaled: Float[Array, "*N V"], weigh: Callable[[Array], Array], wanted: Float[Array, "*N"]
) -> Float[Array, "*N V"]:
    """Keeps the fewest tokens, from the top, whose weights sum to `wanted`; infinity keeps all."""

    def truncated() -> Float[Array, "*N V"]:
        # Bisection from the highest bit down, for the largest threshold whose tokens still have the wanted weight.
        weights, order = weigh(scaled), _ordered_bits(scaled)

        def bit(place: Int[Array, ""], floor: UInt32[Array, "*N"]) -> UInt32[Array, "*N"]:
            higher = floor | (jnp.uint32(1) << (_SIGN_BIT - place).astype(jnp.uint32))
            # Weight of all tokens at or above the candidate threshold.
            weight = jnp.sum(jnp.where(order >= higher[..., None], weights, 0.0), axis=-1)
            return jnp.where(weight >= wanted, higher, floor)

        floor = jax.lax.fori_loop(0, _SIGN_BIT + 1, bit, jnp.zeros(wanted.shape, jnp.uint32))
        return jnp.where(order >= floor[..., None], scaled, -jnp.inf)

    # Skipped if no row has this filter.
    return jax.lax.cond(jnp.any(jnp.isfinite(wanted)), truncated, lambda: scaled)


def _ids(logits: Float[Array, "*N V"]) -> Int[Array, "... V"]:
    """Returns the ids of a vocabulary along the last axis, with the number of axes of the logits."""
    return jnp.arange(logits.shape[-1]).reshape(*[1] * (logits.ndim - 1), -1)


def _ordered_bits(numbers: Float[Array, "*N"]) -> UInt32[Array, "*N"]:
    """Returns unsigned integers in the order of float32 numbers."""
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32)
    sign = jnp.uint32(1 << _SIGN_BIT)
    # Negative numbers have the reverse order as bits, and come before positive ones.
    return jnp.where(bits >= sign, ~bits, bits | sign)
