"""Attention to a cache, which is read in place: no layer copies the cache, or any part that no row attends to.

The TPU compiler turns a gather of rows into slices of all layers, planes and slots. So on a TPU each row is read in
blocks, by a kernel or by a loop over the filled positions of the row. On other platforms one block of all rows is read
at a time, up to the longest row. If gradients are needed, one layer is gathered.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from etils import epy
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.inference._cache_layout import is_one_row, load_heads
from looplm_jax.models import _attention as attention
from looplm_jax.models._blocks import Context, KeyValues
from looplm_jax.sharding import target_platform

with epy.lazy_imports():  # Pallas takes long to import, and only TPUs need the kernel
    from looplm_jax.inference import _decode_kernel as decode_kernel

_BLOCK = 512  # positions of a row whose scores exist together, where rows are read one after another
_BLOCK_OF_ALL = 64  # the same where all rows are read together
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
        if self.differentiable:
            return self._gathered(layer, queries, own, context.mask)

        if target_platform() != "tpu":
            return attend_together(self, layer, queries, own, context.mask)

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
        filled = jnp.arange(self.capacity)[None] < self.lengths[:, None]
        past_mask = jnp.broadcast_to(filled[:, None], (rows, queries.shape[1], self.capacity))
        return attention.attend(queries, (past.keys, own.keys), (past.values, own.values), (past_mask, mask))


# Reading in blocks


@flax.struct.dataclass
class _Mixture:
    """A partial softmax over the keys seen so far: `values` and `total` have a common factor of `exp(top)`."""

    top: Float[Array, "*B G S 1"]
    total: Float[Array, "*B G S 1"]
    values: Float[Array, "*B G S Dh"]


def attend_together(
    view: PastView,
    layer: int | Int[Array, ""],
    queries: Float[Array, "N S H Dh"],
    own: KeyValues,
    mask: Bool[Array, "N S S"],
) -> Float[Array, "N S H Dh"]:
    """Returns the result of `PastView.attend`, reading one block of all rows after another.

    Blocks after the end of a row change nothing in its result, so it does not depend on the other rows.
    """
    blocks = _Blocks(min(_BLOCK_OF_ALL, view.page_size), view.page_size)

    def block(index: Array, mixture: _Mixture) -> _Mixture:
        number, start, positions, new = blocks.at(index)
        pages = jax.lax.dynamic_index_in_dim(view.table, number, axis=1, keepdims=False)

        def rows_of_head(head: Float[Array, "L P M c Dh"]) -> Float[Array, "N b Dh"]:
            def row(plane: Array, page: Array) -> Array:
                # A table entry without a page is clamped, and masked below.
                return jax.lax.dynamic_slice(head, (layer, plane, page, start, 0), (1, 1, 1, blocks.size, width))

            return jax.vmap(row)(view.planes, pages)[:, 0, 0, 0]

        # Each head is gathered into its place: on a CPU, products that transpose would take most of a tick.
        past = jax.tree.map(jax.vmap(rows_of_head, in_axes=4, out_axes=1), view.stacked)
        past = jax.tree.map(lambda x: x.astype(view.dtype), jax.lax.optimization_barrier(past))

        seen = new[None] & (positions[None] < view.lengths[:, None])
        return mix(mixture, grouped, past, jnp.broadcast_to(seen[:, None], (*mask.shape[:2], blocks.size)))

    # Over rows, and over heads, which share the mask of their row.
    mix = jax.vmap(jax.vmap(_mix_in, in_axes=(0, 0, 0, None)))
    width = queries.shape[-1]
    grouped = _group(queries, own.keys.shape[2])
    with_own = mix(_no_keys(grouped), grouped, jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), own), mask)

    mixture = jax.lax.fori_loop(0, blocks.count(jnp.max(view.lengths)), block, with_own)
    return _mixed(mixture, queries)


def attend_row_by_row(
    view: PastView,
    layer: int | Int[Array, ""],
    queries: Float[Array, "N S H Dh"],
    own: KeyValues,
    mask: Bool[Array, "N S S"],
) -> Float[Array, "N S H Dh"]:
    """Returns the result of `PastView.attend`, reading the filled blocks of one row after another."""
    blocks = _Blocks(min(_BLOCK, view.page_size), view.page_size)
    # Over heads, which share the mask. Keys and values are [b, K, Dh].
    mix = jax.vmap(_mix_in, in_axes=(0, 0, 1, None))

    def one_row(row: tuple[Array, Array, Array, Array, KeyValues, Array]) -> Array:
        pages, plane, length, queries, own, mask = row
        grouped = _group(queries, own.keys.shape[1])

        def block(index: Array, mixture: _Mixture) -> _Mixture:
            number, start, positions, new = blocks.at(index)
            at = layer, plane, pages[number], start
            past = jax.tree.map(
                lambda x: load_heads(_block_at(x, at, blocks.size), own.keys.shape).astype(view.dtype), view.stacked
            )
            seen = new & (positions < length)
            return mix(mixture, grouped, past, jnp.broadcast_to(seen, (mask.shape[0], blocks.size)))

        # The new tokens first: each sees itself, so no total is zero.
        with_own = mix(_no_keys(grouped), grouped, own, mask)
        return _mixed(jax.lax.fori_loop(0, blocks.count(length), block, with_own), queries)

    # One row at a time: rows have different lengths.
    return jax.lax.map(one_row, (view.table, view.planes, view.lengths, queries, own, mask))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of `size` positions that cover the pages of a row, as many in each page."""

    size: int
    page_size: int

    def count(self, length: Int[Array, ""]) -> Int[Array, ""]:
        """Returns the number of blocks that contain the first `length` positions: only filled ones are read."""
        pages, rest = jnp.divmod(length, self.page_size)
        return pages * -(-self.page_size // self.size) + -(-rest // self.size)

    def at(self, index: Int[Array, ""]) -> tuple[Array, Array, Int[Array, "b"], Bool[Array, "b"]]:
        """Returns the page of a block, its start in the page, its positions, and which are not in the block before."""
        page, block = jnp.divmod(index, -(-self.page_size // self.size))
        # The last block of a page is moved back to stay inside it, and then overlaps the block before.
        start = jnp.minimum(block * self.size, self.page_size - self.size)
        offsets = start + jnp.arange(self.size)
        return page, start, page * self.page_size + offsets, offsets >= block * self.size


def _block_at(whole: Float[Array, "L P M c R W"], at: tuple[Any, ...], size: int) -> Float[Array, "b R W"]:
    """Returns `size` positions of a page in the layout of the cache.

    Without the constraint, the compiler brings the whole cache into the layout that suits the products best.
    """
    block = jax.lax.dynamic_slice(whole, (*at, 0, 0), (1, 1, 1, size, *whole.shape[4:]))
    major_to_minor = (0, 1, 2, 4, 3, 5) if is_one_row(whole.shape) else (0, 1, 2, 3, 4, 5)
    return with_layout_constraint(block, Layout(major_to_minor))[0, 0, 0]


def _group(queries: Float[Array, "*B S H Dh"], kv_heads: int) -> Float[Array, "*B K G S Dh"]:
    """Returns scaled queries by key head, each of which G query heads share."""
    *rows, tokens, num_heads, width = queries.shape
    grouped = (queries * width**-0.5).reshape(*rows, tokens, kv_heads, num_heads // kv_heads, width)
    return jnp.moveaxis(grouped, -4, -2)


def _no_keys(grouped: Float[Array, "*B G S Dh"]) -> _Mixture:
    """Returns the partial softmax over no keys."""
    rows = (*grouped.shape[:-1], 1)
    return _Mixture(top=jnp.full(rows, _MASKED), total=jnp.zeros(rows), values=jnp.zeros(grouped.shape))


def _mix_in(mixture: _Mixture, queries: Float[Array, "G S Dh"], new: KeyValues, mask: Bool[Array, "S C"]) -> _Mixture:
    """Returns the partial softmax of the queries of one key head with a further block of keys and values, [C, Dh]."""
    scores = jnp.einsum("gsd,cd->gsc", queries, new.keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[None], scores, jnp.float32(_MASKED))

    top = jnp.maximum(mixture.top, jnp.max(scores, axis=-1, keepdims=True))
    # Earlier sums are rescaled to the new maximum, as in flash attention.
    weights, shrink = jnp.exp(scores - top), jnp.exp(mixture.top - top)
    values = jnp.einsum("gsc,cd->gsd", weights.astype(new.values.dtype), new.values, preferred_element_type=jnp.float32)

    return _Mixture(
        top=top,
        total=mixture.total * shrink + jnp.sum(weights, axis=-1, keepdims=True),
        values=mixture.values * shrink + values,
    )


def _mixed(mixture: _Mixture, queries: Float[Array, "*B S H Dh"]) -> Float[Array, "*B S H Dh"]:
    """Returns the result of attention in the shape and the dtype of the queries."""
    mixed = (mixture.values / mixture.total).astype(queries.dtype)
    # [..., K, G, S, Dh] -> [..., S, K, G, Dh]
    return jnp.moveaxis(mixed, -2, -4).reshape(queries.shape)
