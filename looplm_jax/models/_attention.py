"""Attention as pure functions on arrays: rotary embedding, masks and softmax attention."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # not -inf, so that a query without any visible key stays finite
_SHORTEST_BLOCK, _MOST_BLOCKS = 64, 4  # queries, and blocks of queries, of `attend_in_blocks`


def rotary_angles(
    positions: Int[Array, "B S"], head_dim: int, theta: float
) -> tuple[Float[Array, "B S 1 half"], Float[Array, "B S 1 half"]]:
    """Returns cosines and sines of `positions * theta ** (-2 i / Dh)`, in float32."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B S N Dh"], cos: Float[Array, "B S 1 half"], sin: Float[Array, "B S 1 half"]
) -> Float[Array, "B S N Dh"]:
    """Applies rotary embedding to split halves (`rotate_half`): element i is paired with element i + Dh/2."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def visible(
    query_positions: Int[Array, "B Q"],
    query_segments: Int[Array, "B Q"],
    key_positions: Int[Array, "B C"],
    key_segments: Int[Array, "B C"],
) -> Bool[Array, "B Q C"]:
    """Returns which keys each query sees: those of its own document at its position or before.

    Positions count from the start of each document, so the same rule is valid for packed sequences, padded sequences
    and caches.
    """
    causal = query_positions[:, :, None] >= key_positions[:, None, :]
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def attend(
    queries: Float[Array, "B Q H Dh"],
    keys: tuple[Float[Array, "B _ K Dh"], ...],
    values: tuple[Float[Array, "B _ K Dh"], ...],
    masks: tuple[Bool[Array, "B Q _"], ...],
) -> Float[Array, "B Q H Dh"]:
    """Computes grouped-query softmax attention over several blocks of keys, such as a cache and the current tokens.

    One softmax in float32 spans all blocks, with scores scaled by `Dh ** -0.5`. The blocks are not concatenated,
    because that would copy the cache.

    Args:
      queries: the queries.
      keys: the keys of each block.
      values: the values of each block.
      masks: which keys of each block each query sees.
    """
    batch, length, num_heads, head_dim = queries.shape
    num_kv_heads = keys[0].shape[2]
    # [B, Q, K, G, Dh]: G query heads share each key head.
    grouped = (queries * head_dim**-0.5).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)

    # [B, K, G, Q, C], with the blocks of keys concatenated along C.
    scores = jnp.concatenate([_scores(grouped, block, mask) for block, mask in zip(keys, masks, strict=True)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)

    sizes = [block.shape[1] for block in values]
    starts = [sum(sizes[:index]) for index in range(1, len(sizes))]
    # The weights are split again, so that each block of values is used in place.
    parts = jnp.split(weights, starts, axis=-1)

    mixed = [jnp.einsum("bkgqc,bckd->bqkgd", part, block) for part, block in zip(parts, values, strict=True)]
    return functools.reduce(jnp.add, mixed).reshape(queries.shape)


def attend_in_blocks(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    mask: Bool[Array, "B S S"],
) -> Float[Array, "B S H Dh"]:
    """Returns the same as `attend` of one block, for a mask that hides every later column; faster on a CPU.

    Each of up to four blocks of queries meets only the keys up to its own end, which saves up to 3/8 of the work.
    Sequences too short for two blocks are left to `attend`.
    """
    batch, length, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[2]
    count = min(length // _SHORTEST_BLOCK, _MOST_BLOCKS)
    if count < 2:
        return attend(queries, (keys,), (values,), (mask,))

    # Heads come before positions, so that all products of a batch read rows. The barrier keeps XLA from undoing the
    # transposes: its CPU products of strided matrices are slower than copying them.
    grouped = (queries * head_dim**-0.5).reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    grouped, keys, values = jax.lax.optimization_barrier(
        (grouped.transpose(0, 2, 3, 1, 4), keys.transpose(0, 2, 1, 3), values.transpose(0, 2, 1, 3))
    )

    def block(start: int, end: int) -> Float[Array, "B K G _ Dh"]:
        scores = jnp.einsum(
            "bkgqd,bkcd->bkgqc", grouped[:, :, :, start:end], keys[:, :, :end], preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask[:, None, None, start:end, :end], scores, jnp.float32(_MASKED))
        weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
        return jnp.einsum("bkgqc,bkcd->bkgqd", weights, values[:, :, :end])

    bounds = [length * index // count for index in range(count + 1)]
    mixed = jnp.concatenate([block(*ends) for ends in itertools.pairwise(bounds)], axis=3)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(queries.shape)


def _scores(
    grouped: Float[Array, "B Q K G Dh"], keys: Float[Array, "B C K Dh"], mask: Bool[Array, "B Q C"]
) -> Float[Array, "B K G Q C"]:
    """Returns masked scores in float32. G is the number of queries per key head."""
    scores = jnp.einsum("bqkgd,bckd->bkgqc", grouped, keys, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], scores, jnp.float32(_MASKED))
