"""A TPU kernel for attention of one decoded token per slot to the filled positions of its pages.

The kernel reads the cache in place. It copies blocks of positions, at most a page each, from HBM by DMA and computes on
one block while the next one arrives, across slots too. Page numbers of all slots are in scalar memory, where the DMA
looks up the address of a block. All heads are computed in one matrix product, in which scores of a query head with the
keys of another head are masked, so no array is transposed. Elsewhere than on a TPU the kernel is interpreted, slowly,
for tests.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from looplm_jax.inference._cache_layout import LANES, own_mixtures, spread_queries, store_heads
from looplm_jax.models._blocks import KeyValues
from looplm_jax.sharding import logical_to_spec, target_platform

_LONGEST_BLOCK = 128  # positions
_SMALLEST_BLOCK = 16  # positions; shorter copies from HBM are slow
_BLOCK_BYTES = 1 << 19  # of keys; VMEM has two blocks of keys and two of values
_LEAST_OWN_ROWS = 8  # of sublanes
_MASKED = -1e30  # not -inf, so that the maximum of a block in which every key is masked is finite
_ANOTHER_HEAD = 1 << 30  # larger than any position


def fits(page_size: int, stored_width: int) -> bool:
    """Returns whether the kernel can read pages of this size with rows of heads of this width (see `_cache_layout`)."""
    return stored_width % LANES == 0 and math.gcd(page_size, _LONGEST_BLOCK) >= _SMALLEST_BLOCK


def decode_attention(
    queries: Float[Array, "N H Dh"],
    own: KeyValues,
    stacked: KeyValues,
    layer: int | Int[Array, ""],
    planes: Int[Array, "N"],
    table: Int[Array, "N pages"],
    lengths: Int[Array, "N"],
) -> Float[Array, "N H Dh"]:
    """Returns softmax attention of one token per slot to its row and to itself, with scores scaled by `Dh ** -0.5`.

    On a mesh each device computes its heads.

    Args:
      queries: the queries of the tokens.
      own: keys and values of the tokens, `[N, K, Dh]`.
      stacked: keys and values of the cache, `[L, P, M, c, R, W]`, as `_cache_layout` stores heads.
      layer: the layer of the cache to read.
      planes: the plane that each slot reads.
      table: the page numbers of each slot; entries beyond the filled pages are not read.
      lengths: the filled positions of each slot; 0 skips the cache.
    """
    where = jnp.asarray(layer, jnp.int32), planes, table, lengths
    arrays = queries, own.keys, own.values, stacked.keys, stacked.values, *where
    if jax.sharding.get_abstract_mesh().empty:
        return _on_one_device(*arrays)
    heads, kv_heads = logical_to_spec(None, "heads", None), logical_to_spec(None, "kv_heads", None)
    cache, whole = logical_to_spec(None, None, None, None, "kv_heads", None), logical_to_spec()
    mapped = jax.shard_map(
        _on_one_device,
        in_specs=(heads, kv_heads, kv_heads, cache, cache, whole, whole, whole, whole),
        out_specs=heads,
        check_vma=False,  # Pallas calls have no rule for the mesh axes along which their results vary
    )
    return mapped(*arrays)


def _on_one_device(
    queries: Float[Array, "N H Dh"],
    own_keys: Float[Array, "N K Dh"],
    own_values: Float[Array, "N K Dh"],
    keys: Float[Array, "L P M c R W"],
    values: Float[Array, "L P M c R W"],
    layer: Int[Array, ""],
    planes: Int[Array, "N"],
    table: Int[Array, "N pages"],
    lengths: Int[Array, "N"],
) -> Float[Array, "N H Dh"]:
    depth, all_pages, page_size, rows, width = keys.shape[1:]
    slots, num_heads, head_width = queries.shape
    heads = own_keys.shape[1:]
    block = _block_size(page_size, rows * width * keys.dtype.itemsize)
    columns = block * rows
    # Mosaic has no product with one key in bfloat16. Rows that are added here are masked: they are of later positions.
    own_rows = max(rows, _LEAST_OWN_ROWS)
    own = [
        jnp.pad(store_heads(array, keys.shape), [(0, 0), (0, own_rows - rows), (0, 0)])
        for array in (own_keys, own_values)
    ]
    # A block has two axes, those of the tiles in memory: one for positions and rows of heads, one for lanes.
    flat = (-1, page_size * rows, width)

    # The DMA of the first block of a slot starts during the last block of the slot before it that has any.
    pages = (layer * depth + planes)[:, None] * all_pages + table
    blocks = -(-lengths // block)
    next_filled = jax.lax.cummin(jnp.where(blocks > 0, jnp.arange(slots), slots), reverse=True)
    schedule = pages.reshape(-1), lengths, jnp.cumsum(blocks) - blocks, jnp.append(next_filled, slots)

    def per_slot(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda slot, *_: (slot, 0, 0))

    mixed = pl.pallas_call(
        functools.partial(_kernel, block=block, blocks_per_page=page_size // block, pages_per_slot=table.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(slots,),
            in_specs=[
                pl.BlockSpec((num_heads, columns), lambda slot, *_: (0, 0)),
                per_slot(num_heads, width),
                per_slot(own_rows, width),
                per_slot(own_rows, width),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=per_slot(num_heads, width),
            scratch_shapes=[
                pltpu.VMEM((2, columns, width), keys.dtype),
                pltpu.VMEM((2, columns, width), values.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((slots, num_heads, width), queries.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=target_platform() != "tpu",
        name="decode_attention",
    )(
        *schedule,
        _positions(num_heads, rows, block),
        spread_queries(queries * head_width**-0.5, heads[0], keys.shape),
        *own,
        keys.reshape(flat),
        values.reshape(flat),
    )
    return own_mixtures(mixed, rows, heads)


def _block_size(page_size: int, position_bytes: int) -> int:
    """Returns the positions of a block: a power of two that divides the page."""
    size = math.gcd(page_size, _LONGEST_BLOCK)
    while size > _SMALLEST_BLOCK and size * position_bytes > _BLOCK_BYTES:
        size //= 2
    return size


def _positions(num_heads: int, rows: int, block: int) -> Int[np.ndarray, "H columns"]:
    """Returns the position in its block of each column of scores, or `_ANOTHER_HEAD` for keys of other heads.

    Columns are positions and, within a position, rows of heads.
    """
    position, row = np.divmod(np.arange(block * rows), rows)
    row_of_query = np.arange(num_heads)[:, None] // (num_heads // rows)
    return np.where(row == row_of_query, position, _ANOTHER_HEAD).astype(np.int32)


def _kernel(
    pages: Any,  # page numbers in the flattened cache, slot after slot
    lengths: Any,
    blocks_before: Any,  # the number of blocks of all earlier slots, whose parity selects the first buffer
    next_filled: Any,  # entry n: the first slot from n on that has blocks, or the number of slots
    positions: Any,
    queries: Any,
    own_keys: Any,
    own_values: Any,
    cache_keys: Any,
    cache_values: Any,
    out: Any,
    key_buffers: Any,
    value_buffers: Any,
    arrived: Any,
    *,
    block: int,
    blocks_per_page: int,
    pages_per_slot: int,
) -> None:
    slot, slots = pl.program_id(0), pl.num_programs(0)
    columns = positions.shape[1]
    count, first_buffer = (lengths[slot] + block - 1) // block, blocks_before[slot] % 2
    query = queries[0]

    def copies(of: Array, number: Array, buffer: Array) -> list[Any]:
        page = pages[of * pages_per_slot + number // blocks_per_page]
        where = pl.ds(pl.multiple_of(number % blocks_per_page * columns, columns), columns)
        pairs = (cache_keys, key_buffers), (cache_values, value_buffers)
        return [
            pltpu.make_async_copy(whole.at[page, where], buffers.at[buffer], arrived.at[buffer, which])
            for which, (whole, buffers) in enumerate(pairs)
        ]

    def start(of: Array, number: Array, buffer: Array) -> None:
        for copy in copies(of, number, buffer):
            copy.start()

    def scores(keys: Array, visible: Array) -> Array:
        products = jax.lax.dot_general(query, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return jnp.where(visible, products, _MASKED)

    def mix(weights: Array, values: Array) -> Array:
        return jnp.dot(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)

    @pl.when((slot == 0) & (next_filled[0] < slots))
    def _() -> None:
        start(next_filled[0], jnp.int32(0), jnp.int32(0))

    def one_block(number: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, mixed = carry
        buffer = (first_buffer + number) % 2
        last = number + 1 == count
        following = jnp.where(last, next_filled[slot + 1], slot)

        @pl.when(following < slots)
        def _() -> None:
            start(following, jnp.where(last, 0, number + 1), 1 - buffer)

        for copy in copies(slot, number, buffer):
            copy.wait()
        found = scores(key_buffers[buffer].astype(query.dtype), positions[...] < lengths[slot] - number * block)
        higher = jnp.maximum(top, jnp.max(found, axis=1, keepdims=True))
        weights, shrink = jnp.exp(found - higher), jnp.exp(top - higher)
        total = total * shrink + jnp.sum(weights, axis=1, keepdims=True)
        return higher, total, mixed * shrink + mix(weights, value_buffers[buffer].astype(query.dtype))

    # The softmax starts with the token itself, so its total is never zero.
    found = scores(own_keys[0], positions[:, : own_keys.shape[1]] == 0)
    top = jnp.max(found, axis=1, keepdims=True)
    weights = jnp.exp(found - top)
    carry = top, jnp.sum(weights, axis=1, keepdims=True), mix(weights, own_values[0])
    _, total, mixed = jax.lax.fori_loop(0, count, one_block, carry)
    out[0] = (mixed / total).astype(out.dtype)
