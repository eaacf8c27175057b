"""The layout of heads in a cache: on a TPU, heads of fewer than 128 numbers share rows of whole lanes.

A TPU keeps the last axis of an array in lanes of 128. It gives an array of narrower heads another order of axes, and a
program that reads the cache in the order of the decode kernel then copies the whole cache first. Therefore heads are
stored side by side, as many as fit in 128 lanes and divide the heads of a device; lanes that are left over are zero.
Attention to such a row is attention to one head if the query is zero in the lanes of the other heads.

Arrays end in `[K, Dh]` for K heads of width Dh, and in `[R, W]` where they are stored. On other platforms the two are
the same, and the functions return their arguments.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from looplm_jax.sharding import target_platform

LANES = 128  # of a vector register of a TPU


def stored_heads(kv_heads: int, head_width: int) -> tuple[int, int]:
    """Returns R and W for the platform and the mesh of the program that is being traced."""
    if target_platform() != "tpu":
        return kv_heads, head_width
    return in_lanes(kv_heads, head_width, devices=jax.sharding.get_abstract_mesh().shape.get("tensor", 1))


def in_lanes(kv_heads: int, head_width: int, *, devices: int = 1) -> tuple[int, int]:
    """Returns R and W on TPUs. R is a multiple of `devices`, among which the heads are divided."""
    heads_of_device = kv_heads // devices
    most = max(LANES // head_width, 1)
    side_by_side = max(count for count in range(1, most + 1) if heads_of_device % count == 0)
    return kv_heads // side_by_side, -(-side_by_side * head_width // LANES) * LANES


def store_heads(heads: Float[Array, "*B K Dh"], stored: tuple[int, ...]) -> Float[Array, "*B R W"]:
    """Returns heads in the layout of a cache; `stored` is its shape, or the last two axes of it."""
    rows, width = stored[-2:]
    return _pad(heads.reshape(*heads.shape[:-2], rows, -1), width)


def load_heads(stored: Float[Array, "*B R W"], heads: tuple[int, ...]) -> Float[Array, "*B K Dh"]:
    """Returns stored keys or values as heads; `heads` is `(K, Dh)`, or a shape that ends in them."""
    kv_heads, head_width = heads[-2:]
    used = kv_heads // stored.shape[-2] * head_width
    return stored[..., :used].reshape(*stored.shape[:-2], kv_heads, head_width)


def spread_queries(queries: Float[Array, "*B H Dh"], kv_heads: int, stored: tuple[int, ...]) -> Float[Array, "*B H W"]:
    """Returns queries in the lanes of the key head that each attends to, and zeros in the other lanes of its row."""
    rows, width = stored[-2:]
    if width == queries.shape[-1]:
        return queries
    own = _own_place(queries.shape[-2], kv_heads, kv_heads // rows)
    spread = jnp.where(own, queries[..., None, :], 0)
    return _pad(spread.reshape(*queries.shape[:-1], -1), width)


def own_mixtures(mixed: Float[Array, "*B H W"], rows: int, heads: tuple[int, ...]) -> Float[Array, "*B H Dh"]:
    """Returns, of what each query mixed of rows of values, the lanes of its own head; `heads` ends in `(K, Dh)`."""
    kv_heads, head_width = heads[-2:]
    if mixed.shape[-1] == head_width:
        return mixed
    num_heads, side_by_side = mixed.shape[-2], kv_heads // rows
    of_heads = mixed[..., : side_by_side * head_width].reshape(*mixed.shape[:-1], side_by_side, head_width)
    return jnp.sum(jnp.where(_own_place(num_heads, kv_heads, side_by_side), of_heads, 0), axis=-2)


def _own_place(num_heads: int, kv_heads: int, side_by_side: int) -> Bool[Array, "H side_by_side 1"]:
    kv_head = jnp.arange(num_heads) // (num_heads // kv_heads)
    return (kv_head[:, None] % side_by_side == jnp.arange(side_by_side))[..., None]


def _pad(rows: Float[Array, "*B w"], width: int) -> Float[Array, "*B W"]:
    missing = width - rows.shape[-1]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows
