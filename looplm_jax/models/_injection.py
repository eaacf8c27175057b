"""Injections: how the embedded input enters every loop, and the noise from which a state may start."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from looplm_jax.models._parameters import parameter
from looplm_jax.random_keys import seeded_key

# The initial decay of a diagonal injection, which Parcae prints: exp(-softplus(b)) = sqrt(1/5).
_DECAY = math.sqrt(1 / 5)
_INITIAL_STEP_BIAS = math.log(math.expm1(-math.log(_DECAY)))  # the inverse of softplus
_CUT = 3.0  # standard deviations at which noise is cut

DIAGONAL = "diagonal_injection"  # the group of its parameters


class DiagonalInjection(nn.Module):
    """The map `a * h + d * (B e)` with `a = exp(-d exp(A))` and `d = softplus(b)`, elementwise (arXiv 2604.12946).

    Every entry of `a` is between 0 and 1, so the state cannot grow by the injection alone. A starts at 0, B at the
    identity, and b where `a` is sqrt(1/5).
    """

    @nn.compact
    def __call__(self, state: Float[Array, "B S D"], embedded: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns the input of the loop."""
        width = state.shape[-1]
        log_decay = parameter(self, "log_decay", nn.initializers.zeros, ("norm",), (width,))
        step_bias = parameter(self, "step_bias", nn.initializers.constant(_INITIAL_STEP_BIAS), ("norm",), (width,))
        input_map = parameter(self, "input_map", _identity, ("embed_in", "embed"), (width, width))

        # In float32: the decay is close to 1, and every loop multiplies by it.
        step = jax.nn.softplus(step_bias.astype(jnp.float32))
        decay = jnp.exp(-step * jnp.exp(log_decay.astype(jnp.float32)))

        decay, step = (x.astype(state.dtype)[None, None] for x in (decay, step))
        return decay * state + step * (embedded @ input_map.astype(embedded.dtype))


def _identity(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    del key
    return jnp.eye(*shape, dtype=dtype)


def starts_as_add(key: PRNGKeyArray, shape: tuple[int, int], dtype: DTypeLike) -> Array:
    """Initializes linear injection as the sum of state and input: two stacked identity matrices."""
    del key
    # Training starts from the simpler injection and may move away from it.
    identity = jnp.eye(shape[1], dtype=dtype)
    return jnp.concatenate([identity, identity])


# Noise as the first state


def noise_seeds(seeds: Int[Array, "B"], positions: Int[Array, "B S"]) -> UInt32[Array, "B S"]:
    """Returns a seed for the noise of each token, from the seed of its request and its position alone."""

    def of_token(seed: Array, position: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(seeded_key(seed), position))

    return jax.vmap(jax.vmap(of_token, in_axes=(None, 0)))(seeds, positions)


def truncated_noise(seeds: UInt32[Array, "B S"], width: int, std: float, dtype: DTypeLike) -> Float[Array, "B S D"]:
    """Returns normal noise that is cut at three standard deviations. That of a token depends on its seed alone."""

    def of_token(seed: Array) -> Array:
        key = jax.random.fold_in(seeded_key(0), seed)
        return std * jax.random.truncated_normal(key, -_CUT, _CUT, (width,), jnp.float32)

    return jax.vmap(jax.vmap(of_token))(seeds).astype(dtype)
