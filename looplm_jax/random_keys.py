"""Random keys that depend only on a seed."""

import jax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

_IMPLEMENTATION = "threefry2x32"  # other implementations may draw different values in a batch than alone


def seeded_key(seed: int | Int[Array, ""]) -> PRNGKeyArray:
    """Returns the key for a seed, independent of JAX_DEFAULT_PRNG_IMPL."""
    return jax.random.key(seed, impl=_IMPLEMENTATION)


def from_raw(raw: UInt32[Array, "2"]) -> PRNGKeyArray:
    """Returns the key with the raw data `raw`, as `jax.random.key_data` returns it for keys of `seeded_key`."""
    return jax.random.wrap_key_data(raw, impl=_IMPLEMENTATION)
