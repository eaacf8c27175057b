"""The cache of a decoder: keys and values of every loop and layer, with a static capacity and a length for each row."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from looplm_jax.config import ModelConfig
from looplm_jax.models.blocks import Context, KeyValues, make_context
from looplm_jax.models.looplm import ModelCache

_SMALLEST_BUCKET = 64


@flax.struct.dataclass
class Cache:
    """Row b holds the tokens at positions `0 .. lengths[b] - 1`; what lies behind them is never looked at.

    Core and coda are `[T, L, B, C, K, Dh]`, the prelude is `[L, B, C, K, Dh]`, for a capacity of C positions.
    """

    planes: ModelCache
    lengths: Int[Array, "B"]

    @property
    def capacity(self) -> int:
        """Positions of a row, C."""
        return self.planes.core.keys.shape[3]

    def context(self, config: ModelConfig) -> Context:
        """What the next token of each row sees: the tokens of the row, and itself."""
        slots = jnp.broadcast_to(jnp.arange(self.capacity), (self.lengths.size, self.capacity))
        filled = (slots < self.lengths[:, None]).astype(jnp.int32)
        own = jnp.ones((self.lengths.size, 1), jnp.int32)
        return make_context(config, self.lengths[:, None], own, slots, filled)

    def append(self, token: ModelCache) -> "Cache":
        """The keys and values of one more token for each row, whose cache position axis has length 1."""
        planes = jax.tree.map(lambda whole, own: _write(whole, own, self.lengths), self.planes, token)
        return Cache(planes=planes, lengths=self.lengths + 1)


def bucket(length: int, longest: int) -> int:
    """The static size for `length` positions: a power of two from 64 up, or `longest` where that is less."""
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), longest)


def from_prefill(planes: ModelCache, lengths: Int[Array, "B"], capacity: int) -> Cache:
    """The cache of a prompt, with room up to `capacity` positions."""

    def widen(x: Float[Array, "*L B P K Dh"]) -> Float[Array, "*L B C K Dh"]:
        room = capacity - x.shape[-3]
        return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, room), (0, 0), (0, 0)])

    return Cache(planes=jax.tree.map(widen, planes), lengths=lengths)


def plane(stacked: KeyValues | None, loop: int | Int[Array, ""]) -> KeyValues | None:
    """Keys and values of one loop, counted from 0."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, loop, keepdims=False), stacked)


def _write(
    whole: Float[Array, "*L B C K Dh"], own: Float[Array, "*L B 1 K Dh"], positions: Int[Array, "B"]
) -> Float[Array, "*L B C K Dh"]:
    def row(whole: Float[Array, "*L C K Dh"], own: Float[Array, "*L 1 K Dh"], position: Int[Array, ""]) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, own, position, axis=whole.ndim - 3)

    batch_axis = whole.ndim - 4
    return jax.vmap(row, in_axes=(batch_axis, batch_axis, 0), out_axes=batch_axis)(whole, own, positions)
