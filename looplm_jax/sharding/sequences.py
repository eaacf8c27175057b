"""Context parallelism: several devices share a sequence, and each has a contiguous range of its positions.

Attention needs whole sequences. An all-to-all before it exchanges positions for heads: each device gives its range of
all heads and receives whole sequences of some heads (DeepSpeed-Ulysses, arXiv 2309.14509). All devices therefore do the
same amount of work under a causal mask.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Int, Shaped

_AXIS = "context"  # the mesh axis that shards positions


def sequence_shards() -> int:
    """Returns the number of devices that share a sequence in the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(_AXIS, 1)


def whole_length(length: int) -> int:
    """Returns the length of a whole sequence, given the length of an array in the traced code."""
    return length * sequence_shards() if _in_local_region() else length


def whole_sequences(x: Int[Array, "B s"]) -> Int[Array, "B S"]:
    """Returns an array of tokens with all positions of each sequence on every device that shares it."""
    if _in_local_region():
        return jax.lax.all_gather(x, _AXIS, axis=1, tiled=True)
    return nn.with_logical_constraint(x, ("batch", None))


def _in_local_region() -> bool:
    """Whether the code is traced inside a `shard_map` over the context axis."""
    return _AXIS in jax.sharding.get_abstract_mesh().manual_axes


def heads_to_devices(x: Shaped[Array, "B s H Dh"]) -> Shaped[Array, "B S h Dh"]:
    """Exchanges a range of positions of all heads for all positions of some heads, by all-to-all.

    Must be called inside a `shard_map` over the context axis.
    """
    return jax.lax.all_to_all(x, _AXIS, split_axis=2, concat_axis=1, tiled=True)


def heads_from_devices(x: Shaped[Array, "B S h Dh"]) -> Shaped[Array, "B s H Dh"]:
    """Exchanges all positions of some heads for a range of positions of all heads: the inverse."""
    return jax.lax.all_to_all(x, _AXIS, split_axis=1, concat_axis=2, tiled=True)
