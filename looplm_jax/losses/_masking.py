"""The mean over unmasked tokens, of a whole batch or as the share of a microbatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from looplm_jax.halting._distribution import at_least_float32


def mean_weights(
    mask: Float[Array, "*B"] | None, count: Float[Array, ""] | None, tokens: tuple[int, ...]
) -> Float[Array, "*B"]:
    """Returns weights that turn a sum over tokens into a mean over unmasked ones; all zero if there are none.

    Args:
      mask: 1 for tokens that count, 0 for others; None counts all.
      count: the number by which sums are divided; None for the number of unmasked tokens. A microbatch is given that of
        the whole batch, so that the means of its microbatches add up to the mean of the batch.
      tokens: the shape of the tokens.
    """
    # In float32 at least: in bfloat16, a sum of ones ends at 256.
    mask = jnp.ones(tokens, jnp.float32) if mask is None else at_least_float32(mask)
    divisor = jnp.sum(mask) if count is None else count.astype(mask.dtype)

    # Without an unmasked token the weights are 0 / 1 instead of 0 / 0.
    return mask / jnp.maximum(divisor, 1.0)
