"""How a cache stores the heads of a position: on a TPU, in rows of whole lanes.

A TPU stores the last axis of an array in lanes of 128. An array of narrower heads gets another layout there, or is
padded, and every program that reads it in the order of the decode kernel copies it first. So heads are stored side by
side, as many as fit into 128 lanes and divide the heads of a device, and what is left of the lanes is zero. A query
that is zero in the lanes of the other heads of its row has the scores of its own head alone.

Arrays here end in `[K, Dh]` for K heads of width Dh, or, as stored, in `[R, W]`. Elsewhere than on a TPU the two are
the same, and all functions return what they are given.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from looplm_jax.sharding import target_platform

LANES = 128


def stored_heads(kv_heads: int, head_width: int) -> tuple[int, int]:
    """Returns R and W, in which the program at hand stores K heads of width Dh.

    On a mesh each device has whole rows, so R divides over the devices among which the heads are divided.
    """
    if target_platform() != "tpu":
        return kv_heads, head_width
    devices = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return in_lanes(kv_heads, head_width, devices=devices)


def in_lanes(kv_heads: int, head_width: int, *, devices: int = 1) -> tuple[int, int]:
    """Returns R and W for K heads of width Dh that are divided among devices with lanes."""
    of_device = kv_heads // devices
    most = max(LANES // head_width, 1)
    beside = max(count for count in range(1, most + 1) if of_device % count == 0)
    return kv_heads // beside, -(-beside * head_width // LANES) * LANES


def store(heads: Float[Array, "*B K Dh"], like: Array) -> Float[Array, "*B R W"]:
    """Returns heads as a cache stores them that ends in the axes of `like`."""
    rows, width = like.shape[-2:]
    beside_each_other = heads.reshape(*heads.shape[:-2], rows, -1)
    return _padded(beside_each_other, width)


def load(stored: Float[Array, "*B R W"], kv_heads: int, head_width: int) -> Float[Array, "*B K Dh"]:
    """Returns the heads that a cache stores."""
    rows = stored.shape[-2]
    return stored[..., : kv_heads // rows * head_width].reshape(*stored.shape[:-2], kv_heads, head_width)


def store_queries(queries: Float[Array, "*B H Dh"], kv_heads: int, like: Array) -> Float[Array, "*B H W"]:
    """Returns queries that are zero but in the lanes in which the keys of their head are stored."""
    if queries.shape[-1] == like.shape[-1]:
        return queries
    beside = kv_heads // like.shape[-2]
    spread = queries[..., None, :] * _own_lanes(queries.shape[-2], kv_heads, beside).astype(queries.dtype)
    return _padded(spread.reshape(*queries.shape[:-1], -1), like.shape[-1])


def load_mixtures(stored: Float[Array, "*B H W"], kv_heads: int, like: Array) -> Float[Array, "*B H Dh"]:
    """Returns what each query mixed of the values of its own head, given what it mixed of a row of heads.

    Args:
      stored: mixtures of rows of the cache.
      kv_heads: heads of keys and values, K.
      like: an array that ends in `[K, Dh]`.
    """
    head_width = like.shape[-1]
    if stored.shape[-1] == head_width:
        return stored
    num_heads, beside = stored.shape[-2], kv_heads // like.shape[-2]
    raise NotImplementedError((num_heads, beside))


def _own_lanes(num_heads: int, kv_heads: int, beside: int) -> Float[Array, "H beside 1"]:
    head = jnp.arange(num_heads) // (num_heads // kv_heads)
    return jax.nn.one_hot(head % beside, beside)[..., None]


def _padded(rows: Float[Array, "*B w"], width: int) -> Float[Array, "*B W"]:
    missing = width - rows.shape[-1]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows
