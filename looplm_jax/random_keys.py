"""Random keys that follow from a seed alone."""

import jax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

_IMPLEMENTATION = "threefry2x32"  # others draw otherwise in a batch than alone


def seeded_key(seed: int | Int[Array, ""]) -> PRNGKeyArray:
    """Returns the key of a seed, the same whatever JAX_DEFAULT_PRNG_IMPL says."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def from_raw(raw: UInt32[Array, "2"]) -> PRNGKeyArray:
    """Returns the key whose raw form is `raw`, as `jax.random.key_data` gives it for keys of `seeded_key`."""
    return jax.random.wrap_key_data(raw, impl=_IMPLEMENTATION)
