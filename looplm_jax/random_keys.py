"""Random keys that follow from a seed alone."""

import jax
from jaxtyping import Array, Int, PRNGKeyArray

_IMPLEMENTATION = "threefry2x32"  # others draw otherwise in a batch than alone


def seeded_key(seed: int | Int[Array, ""]) -> PRNGKeyArray:
    """Returns the key of a seed, the same whatever JAX_DEFAULT_PRNG_IMPL says."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)
