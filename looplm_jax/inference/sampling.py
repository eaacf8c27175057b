"""The next token from logits: greedy, or drawn at a temperature from the most probable ones."""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from looplm_jax.errors import UserError

_SEEDS = 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; greedy by default. `top_k` cuts first, `top_p` then counts what is left as the whole."""

    temperature: float = 0.0  # logits are divided by it; 0 takes the most probable token
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the fewest tokens whose probability reaches p; 1: all
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(f"temperature must not be negative, not {self.temperature}; 0 takes the likeliest token")
        if not 0 <= self.top_k < _SEEDS:
            raise UserError(f"top_k must not be negative, not {self.top_k}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}; 1 keeps all tokens")
        if not 0 <= self.seed < _SEEDS:
            raise UserError(f"seed must be in 0..{_SEEDS - 1}, not {self.seed}")


@flax.struct.dataclass
class Shortlist:
    """Tokens from the most to the least probable, and their logits over the temperature: minus infinity if left out."""

    tokens: Int[Array, "V"]
    logits: Float[Array, "V"]


def token_key(sampling: Sampling, number: int | Int[Array, ""]) -> PRNGKeyArray:
    """The key of the n-th new token, which depends on the seed and on n alone."""
    return jax.random.fold_in(jax.random.key(sampling.seed), number)


def sample(logits: Float[Array, "V"], sampling: Sampling, key: PRNGKeyArray) -> Int[Array, ""]:
    """One token. Pure; the numbers of `sampling` may be traced."""

    def draw() -> Int[Array, ""]:
        kept = shortlist(logits, sampling)
        return kept.tokens[jax.random.categorical(key, kept.logits)]

    def greedy() -> Int[Array, ""]:
        return jnp.argmax(logits).astype(jnp.int32)

    return jax.lax.cond(jnp.asarray(sampling.temperature) > 0, draw, greedy)


def shortlist(logits: Float[Array, "V"], sampling: Sampling) -> Shortlist:
    """What a positive temperature, `top_k` and `top_p` leave to draw from; the most probable token is always in it."""
    tokens = jnp.argsort(-logits).astype(jnp.int32)
    scaled = logits[tokens] / sampling.temperature
    top_k, top_p = jnp.asarray(sampling.top_k), jnp.asarray(sampling.top_p, jnp.float32)
    scaled = jnp.where((jnp.arange(scaled.size) < top_k) | (top_k == 0), scaled, -jnp.inf)
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities) - probabilities
    kept = (before < top_p) | (top_p >= 1)  # sums of float32 may pass 1 before the last token
    kept = kept.at[0].set(True)  # for a p that vanishes beside rounding
    return Shortlist(tokens=tokens, logits=jnp.where(kept, scaled, -jnp.inf))
