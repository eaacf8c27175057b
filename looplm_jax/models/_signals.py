"""Signals that are added to the input of every loop: the position of a token and the number of the loop.

The sinusoids are those of the Universal Transformer (arXiv 1807.03819, section 2.1).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sinusoids(numbers: Int[Array, "*B"], width: int) -> Float[Array, "*B D"]:
    """Returns sines at even and cosines at odd entries, of `i / 10000 ** (2 j / D)`, in float32.

    Args:
      numbers: positions or numbers of loops, from 0; `i` counts from 1.
      width: the even number of entries, D; `j` is in 0..D/2-1.
    """
    rates = 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = (numbers + 1).astype(jnp.float32)[..., None] * rates.reshape(*[1] * numbers.ndim, -1)
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(*numbers.shape, width)
