"""Sequences that several devices share: each holds a run of their positions.

Attention needs whole sequences. For it the devices trade: each gives its run of all heads and gets whole sequences of
its share of the heads (DeepSpeed-Ulysses, arXiv 2309.14509), so all do the same work under a causal mask.
"""

import flax.linen as nn
import jax
from jaxtyping import Array, Int, Shaped

_AXIS = "context"  # of the mesh


def sequence_shards() -> int:
    """Devices that share a sequence in the mesh in use; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(_AXIS, 1)


def whole_length(length: int) -> int:
    """Returns the positions of a whole sequence, given those of an array of the traced code."""
    return length * sequence_shards() if _in_local_region() else length


def whole_sequences(x: Int[Array, "B s"]) -> Int[Array, "B S"]:
    """Returns an array of tokens with all positions of each sequence on every device that shares it."""
    if _in_local_region():
        return jax.lax.all_gather(x, _AXIS, axis=1, tiled=True)
    return nn.with_logical_constraint(x, ("batch", None))


def _in_local_region() -> bool:
    return _AXIS in jax.sharding.get_abstract_mesh().manual_axes


def heads_to_devices(x: Shaped[Array, "B s H Dh"]) -> Shaped[Array, "B S h Dh"]:
    """From a run of positions of all heads to all positions of some heads, on each device of a `shard_map`."""
    return jax.lax.all_to_all(x, _AXIS, split_axis=2, concat_axis=1, tiled=True)


def heads_from_devices(x: Shaped[Array, "B S h Dh"]) -> Shaped[Array, "B s H Dh"]:
    """The inverse of `heads_to_devices`."""
    return jax.lax.all_to_all(x, _AXIS, split_axis=1, concat_axis=2, tiled=True)
