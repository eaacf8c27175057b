"""Attention to a cache, which is read in place: no layer copies the cache, or any part that no row attends to.

The TPU compiler turns a gather of rows into slices of all layers, planes and slots. So on a TPU each row is read in
blocks, by a kernel or by a loop over the filled positions of the row. On other platforms, and if gradients are needed,
one layer is gathered.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.inference import _decode_kernel as decode_kernel
from looplm_jax.inference._cache_layout import load_heads
from looplm_jax.models import _attention as attention
from looplm_jax.models._blocks import Context, KeyValues
from looplm_jax.sharding import target_platform

_BLOCK = 512  # positions of a row whose scores exist together
# Not minus infinity: a row without a visible key would be NaN.
_MASKED = -1e30


@flax.struct.dataclass
class PastView:
    """The view that the rows of a cache read, each at its own plane, layer by layer. Implements `Past`."""

    stacked: KeyValues  # [L, P, M, c, R, W]
    planes: Int[Array, "N"]
    table: Int[Array, "N W"]  # pages of each row
    lengths: Int[Array, "N"]
    dtype: DTypeLike = flax.struct.field(pytree_node=False)
    differentiable: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def page_size(self) -> int:
        """Returns the positions of a page, c."""
        return self.stacked.keys.shape[3]

    @property
    def capacity(self) -> int:
        """Returns the positions of a row, C."""
        return self.table.shape[1] * self.page_size

    def attend(
        self, layer: int | Int[Array, ""], queries: Float[Array, "N S H Dh"], own: KeyValues, context: Context
    ) -> Float[Array, "N S H Dh"]:
        """Returns attention of the given tokens to the filled positions of their rows and to one another."""
        assert context.mask is not None
        # Neither the kernel nor a loop of data-dependent length can be differentiated in reverse.
        if self.differentiable or target_platform() != "tpu":
            return self._gathered(layer, queries, own, context.mask)

        if queries.shape[1] == 1 and decode_kernel.fits(self.page_size, self.stacked.keys.shape[5]):
            one = KeyValues(keys=own.keys[:, 0], values=own.values[:, 0])
            where = layer, self.planes, self.table, self.lengths
            return decode_kernel.decode_attention(queries[:, 0], one, self.stacked, *where)[:, None]

        return attend_row_by_row(self, layer, queries, own, context.mask)

    def _gathered(
        self,
        layer: int | Int[Array, ""],
        queries: Float[Array, "N S H Dh"],
        own: KeyValues,
        mask: Bool[Array, "N S S"],
    ) -> Float[Array, "N S H Dh"]:
        """Returns attention to a gathered copy of one layer."""
        rows = self.planes.size

        def row_by_row(whole: Float[Array, "L P M c R W"]) -> Float[Array, "N C K Dh"]:
            # [N, W, c, K, Dh]; entries of the table that are not in use are clipped, and masked below.
            pages = whole.at[layer, self.planes[:, None], self.table].get(mode="clip")
            pages = pages.reshape(rows, self.capacity, *whole.shape[4:]).astype(self.dtype)
            return load_heads(pages, own.keys.shape)

        past = jax.tree.map(row_by_row, self.stacked)
        filled = jnp.arange(self.capacity) < self.lengths[:, None]
        past_mask = jnp.broadcast_to(filled[:, None], (rows, queries.shape[1], self.capacity))
        return attention.attend(queries, (past.keys, own.keys), (past.values, own.values), (past_mask, mask))


@flax.struct.dataclass
class _Mixture:
    """A partial softmax over the keys seen so far: `values` and `total` have a common factor of `exp(top)`."""

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
    """Returns the result of `PastView.attend`, reading the filled blocks of one row after another."""
    size = min(_BLOCK, view.page_size)
    blocks_per_page = -(-view.page_size // size)

    def one_row(row: tuple[Array, Array, Array, Array, KeyValues, Array]) -> Array:
        pages, plane, length, queries, own, mask = row
        tokens, num_heads, head_width = queries.shape
        kv_heads = own.keys.shape[1]
        # [S, H, Dh] -> [S, K, G, Dh]: G query heads share a key/value head.
        grouped = (queries * head_width**-0.5).reshape(tokens, kv_heads, num_heads // kv_heads, head_width)

        def block(index: Array, mixture: _Mixture) -> _Mixture:
            page, within = index // blocks_per_page, index % blocks_per_page * size
            # The last block of a page is moved back to stay inside it; `seen` excludes what the block before it
            # covered.
            start = jnp.minimum(within, view.page_size - size)
            offsets = start + jnp.arange(size)
            seen = (offsets >= within) & (page * view.page_size + offsets < length)
            at = layer, plane, pages[page], start
            past = jax.tree.map(
                lambda x: load_heads(_block_at(x, at, size), own.keys.shape).astype(view.dtype), view.stacked
            )
            return _mix_in(mixture, grouped, past, jnp.broadcast_to(seen, (tokens, size)))

        shape = (kv_heads, num_heads // kv_heads, tokens)
        nothing = _Mixture(
            top=jnp.full((*shape, 1), _MASKED), total=jnp.zeros((*shape, 1)), values=jnp.zeros((*shape, head_width))
        )
        # The new tokens first: each sees itself, so no total is zero.
        with_own = _mix_in(nothing, grouped, own, mask)
        # Only filled pages are read, and only the filled blocks of the last one.
        whole, rest = jnp.divmod(length, view.page_size)

        mixture = jax.lax.fori_loop(0, whole * blocks_per_page + -(-rest // size), block, with_own)
        mixed = (mixture.values / mixture.total).astype(queries.dtype)
        # [K, G, S, Dh] -> [S, H, Dh]
        return jnp.moveaxis(mixed, 2, 0).reshape(queries.shape)

    # One row at a time: rows have different lengths.
    return jax.lax.map(one_row, (view.table, view.planes, view.lengths, queries, own, mask))


def _block_at(whole: Float[Array, "L P M c R W"], at: tuple[Any, ...], size: int) -> Float[Array, "b R W"]:
    """Returns `size` positions of a page in the layout of the cache.

    Without the constraint, the compiler brings the whole cache into the layout that suits the products best.
    """
    block = jax.lax.dynamic_slice(whole, (*at, 0, 0), (1, 1, 1, size, *whole.shape[4:]))
    return with_layout_constraint(block, Layout(tuple(range(block.ndim))))[0, 0, 0]


def _mix_in(mixture: _Mixture, grouped: Float[Array, "S K G Dh"], new: KeyValues, mask: Bool[Array, "S C"]) -> _Mixture:
    """Returns the partial softmax with a further block of keys."""
    scores = jnp.einsum("skgd,ckd->kgsc", grouped, new.keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, jnp.float32(_MASKED))

    top = jnp.maximum(mixture.top, jnp.max(scores, axis=-1, keepdims=True))
    # Earlier sums are rescaled to the new maximum, as in flash attention.
    weights, shrink = jnp.exp(scores - top), jnp.exp(mixture.top - top)
    values = jnp.einsum(
        "kgsc,ckd->kgsd", weights.astype(new.values.dtype), new.values, preferred_element_type=jnp.float32
    )

    return _Mixture(
        top=top,
        total=mixture.total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        values=mixture.values * shrink + values,
    )
