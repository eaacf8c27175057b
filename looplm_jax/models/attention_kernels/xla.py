"""Self-attention by XLA. Long sequences are processed in chunks of queries, so no array is [S, S]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from looplm_jax.models.attention import attend, visible

_CHUNK = 512  # queries whose scores exist simultaneously
_NOWHERE = -1  # the document of padding, which matches no key


def xla_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Computes softmax attention to the keys of the same document up to the query's position.

    The backward pass recomputes the scores of each chunk.
    """
    length = queries.shape[1]
    size = min(_CHUNK, length)
    count = -(-length // size)

    def cut(x: Array, padding: int = 0) -> Array:  # [B, S, ...] -> [count, B, size, ...]
        widths = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, widths, constant_values=padding)
        return jnp.moveaxis(padded.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(chunk: tuple[Array, Array, Array]) -> Array:
        own_queries, own_positions, own_segments = chunk
        mask = visible(own_positions, own_segments, positions, segment_ids)
        return attend(own_queries, (keys,), (values,), (mask,))

    mixed = jax.lax.map(one_chunk, (cut(queries), cut(positions), cut(segment_ids, _NOWHERE)))
    whole = jnp.moveaxis(mixed, 0, 1).reshape(queries.shape[0], count * size, *queries.shape[2:])
    return whole[:, :length]
