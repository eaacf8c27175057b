"""Attention to a cache, which is read where it is: no layer copies it, or any part of it that no row attends to.

The TPU compiler turns a gather of rows into slices of all layers, planes and slots, so there each row is read in
blocks, by a kernel or by a loop over the row's filled positions. Elsewhere one layer is gathered, and so it is where
gradients are wanted.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.inference import decode_kernel
from looplm_jax.models import attention
from looplm_jax.models.blocks import Context, KeyValues
from looplm_jax.sharding import target_platform

_BLOCK = 512  # positions of a row whose scores exist at one time
_MASKED = -1e30


@flax.struct.dataclass
class PastView:
    """What the rows of a cache read, each at its own plane, layer by layer. Implements `Past`."""

    stacked: KeyValues  # [L, P, N, C, K, Dh]
    planes: Int[Array, "N"]
    lengths: Int[Array, "N"]
    dtype: DTypeLike = flax.struct.field(pytree_node=False)
    differentiable: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def capacity(self) -> int:
        """Positions of a row, C."""
        return self.stacked.keys.shape[3]

    def attend(
        self, layer: int | Int[Array, ""], queries: Float[Array, "N S H Dh"], own: KeyValues, context: Context
    ) -> Float[Array, "N S H Dh"]:
        """Returns attention of the tokens at hand to the filled positions of their rows and to one another."""
        assert context.mask is not None
        if self.differentiable or target_platform() != "tpu":
            return self._gathered(layer, queries, own, context.mask)
        if queries.shape[1] == 1 and decode_kernel.fits(self.capacity, queries.shape[3]):
            one = KeyValues(keys=own.keys[:, 0], values=own.values[:, 0])
            mixed = decode_kernel.decode_attention(queries[:, 0], one, self.stacked, layer, self.planes, self.lengths)
            return mixed[:, None]
        return attend_row_by_row(self, layer, queries, own, context.mask)

    def _gathered(
        self,
        layer: int | Int[Array, ""],
        queries: Float[Array, "N S H Dh"],
        own: KeyValues,
        mask: Bool[Array, "N S S"],
    ) -> Float[Array, "N S H Dh"]:
        rows = jnp.arange(self.planes.size)
        past = jax.tree.map(lambda x: x[layer, self.planes, rows].astype(self.dtype), self.stacked)
        filled = jnp.arange(self.capacity) < self.lengths[:, None]
        past_mask = jnp.broadcast_to(filled[:, None], (rows.size, queries.shape[1], self.capacity))
        return attention.attend(queries, (past.keys, own.keys), (past.values, own.values), (past_mask, mask))


@flax.struct.dataclass
class _Mixture:
    """A softmax under way over the keys seen so far: `values` and `total` are to be scaled by `exp(top)`."""

    top: Float[Array, "K G S 1"]
    total: Float[Array, "K G S 1"]
    values: Float[Array, "K G S Dh"]


def attend_row_by_row(
    view: PastView,
    layer: int | Int[Array, ""],
    queries: Float[Array, "N S H Dh"],
    own: KeyValues,
    mask: Bool[Array, "N S S"],
) -> Float[Array, "N S H Dh"]:
    """Returns what `PastView.attend` does, reading the filled blocks of one row after another."""
    size = min(_BLOCK, view.capacity)

    def one_row(row: tuple[Array, Array, Array, Array, KeyValues, Array]) -> Array:
        number, plane, length, queries, own, mask = row
        tokens, num_heads, head_width = queries.shape
        kv_heads = own.keys.shape[1]
        grouped = (queries * head_width**-0.5).reshape(tokens, kv_heads, num_heads // kv_heads, head_width)

        def block(index: Array, mixture: _Mixture) -> _Mixture:
            start = jnp.minimum(index * size, view.capacity - size)
            positions = start + jnp.arange(size)
            seen = (positions >= index * size) & (positions < length)
            at = layer, plane, number, start
            past = jax.tree.map(lambda x: _block_at(x, at, size).astype(view.dtype), view.stacked)
            return _mix_in(mixture, grouped, past, jnp.broadcast_to(seen, (tokens, size)))

        shape = (kv_heads, num_heads // kv_heads, tokens)
        nothing = _Mixture(
            top=jnp.full((*shape, 1), _MASKED), total=jnp.zeros((*shape, 1)), values=jnp.zeros((*shape, head_width))
        )
        with_own = _mix_in(nothing, grouped, own, mask)
        mixture = jax.lax.fori_loop(0, -(-length // size), block, with_own)
        mixed = (mixture.values / mixture.total).astype(queries.dtype)
        return jnp.moveaxis(mixed, 2, 0).reshape(queries.shape)

    numbers = jnp.arange(view.planes.size)
    return jax.lax.map(one_row, (numbers, view.planes, view.lengths, queries, own, mask))


def _block_at(whole: Float[Array, "L P N C K Dh"], at: tuple[Any, ...], size: int) -> Float[Array, "c K Dh"]:
    """Returns `size` positions of a row, laid out as in the cache: otherwise the whole cache is brought into the order
    that suits the products best.
    """
    block = jax.lax.dynamic_slice(whole, (*at, 0, 0), (1, 1, 1, size, *whole.shape[4:]))
    return with_layout_constraint(block, Layout(tuple(range(block.ndim))))[0, 0, 0]


def _mix_in(mixture: _Mixture, grouped: Float[Array, "S K G Dh"], new: KeyValues, mask: Bool[Array, "S C"]) -> _Mixture:
    """Returns the softmax over a further block of keys as well."""
    scores = jnp.einsum("skgd,ckd->kgsc", grouped, new.keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.float32(_MASKED))
    top = jnp.maximum(mixture.top, jnp.max(scores, axis=-1, keepdims=True))
    weights, shrink = jnp.exp(scores - top), jnp.exp(mixture.top - top)
    values = jnp.einsum(
        "kgsc,ckd->kgsd", weights.astype(new.values.dtype), new.values, preferred_element_type=jnp.float32
    )
    return _Mixture(
        top=top,
        total=mixture.total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        values=mixture.values * shrink + values,
    )
