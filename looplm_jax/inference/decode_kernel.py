"""A TPU kernel for one decoded token per slot: it reads the filled blocks of a slot's pages, straight from the cache.

Blocks of positions, none larger than a page, come from HBM by DMA while the block before is computed with, from one
slot to the next without a pause. The pages of all slots are listed in scalar memory, where the DMA looks up where a
block is. All heads share one product: scores of a query head with keys of another head are masked, so no array is
transposed. On anything but a TPU the kernel is interpreted, slowly, for tests.
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

from looplm_jax.models.blocks import KeyValues
from looplm_jax.sharding import partition, target_platform

_LANES = 128  # of a vector register
_BLOCK_BYTES = 1 << 19  # of keys; two blocks of keys and two of values are in the chip's fast memory at a time
_SMALLEST_BLOCK = 16  # positions; shorter copies from HBM are slow
_MASKED = -1e30  # not -inf: the maximum of a block with every key masked stays finite
_ANOTHER_HEAD = 1 << 30  # a position that no row has


def fits(page_size: int, head_width: int) -> bool:
    """Returns whether the kernel can read a cache with pages of this size and heads of this width."""
    return head_width % _LANES == 0 and math.gcd(page_size, _LANES) >= _SMALLEST_BLOCK


def decode_attention(
    queries: Float[Array, "N H Dh"],
    own: KeyValues,
    stacked: KeyValues,
    layer: int | Int[Array, ""],
    planes: Int[Array, "N"],
    table: Int[Array, "N W"],
    lengths: Int[Array, "N"],
) -> Float[Array, "N H Dh"]:
    """Returns softmax attention of one token per slot to its row and to itself, scores scaled by `Dh ** -0.5`.

    Args:
      queries: of the tokens.
      own: keys and values of the tokens, `[N, K, Dh]`.
      stacked: the cache, `[L, P, M, c, K, Dh]`.
      layer: which layer of the cache to read.
      planes: which plane each slot reads.
      table: the pages of each slot; what it has beyond those that are filled is not looked at.
      lengths: filled positions of each slot.
    """
    where = jnp.asarray(layer, jnp.int32), planes, table, lengths
    arrays = queries, own.keys, own.values, stacked.keys, stacked.values, *where
    if jax.sharding.get_abstract_mesh().empty:
        return _on_one_device(*arrays)
    heads, kv_heads = partition(None, "heads", None), partition(None, "kv_heads", None)
    cache, whole = partition(None, None, None, None, "kv_heads", None), partition()
    mapped = jax.shard_map(
        _on_one_device,
        in_specs=(heads, kv_heads, kv_heads, cache, cache, whole, whole, whole, whole),
        out_specs=heads,
        check_vma=False,  # Pallas kernels do not tell along which axes their results vary
    )
    return mapped(*arrays)


def _on_one_device(
    queries: Float[Array, "N H Dh"],
    own_keys: Float[Array, "N K Dh"],
    own_values: Float[Array, "N K Dh"],
    keys: Float[Array, "L P M c K Dh"],
    values: Float[Array, "L P M c K Dh"],
    layer: Int[Array, ""],
    planes: Int[Array, "N"],
    table: Int[Array, "N W"],
    lengths: Int[Array, "N"],
) -> Float[Array, "N H Dh"]:
    depth, all_pages, page_size, kv_heads, head_width = keys.shape[1:]
    slots, num_heads, _ = queries.shape
    block = _block_size(page_size, kv_heads * head_width * keys.dtype.itemsize)
    columns = block * kv_heads
    # The last two axes of a block are those of its tiles in memory: one row of tiles for each position and head.
    flat = (-1, page_size * kv_heads, head_width)
    pages = (layer * depth + planes)[:, None] * all_pages + table
    blocks = -(-lengths // block)
    next_filled = jax.lax.cummin(jnp.where(blocks > 0, jnp.arange(slots), slots), reverse=True)
    schedule = pages.reshape(-1), lengths, jnp.cumsum(blocks) - blocks, jnp.append(next_filled, slots)

    def per_slot(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda slot, *_: (slot, 0, 0))

    return pl.pallas_call(
        functools.partial(_kernel, block=block, blocks_per_page=page_size // block, pages_per_slot=table.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(slots,),
            in_specs=[
                pl.BlockSpec((num_heads, columns), lambda slot, *_: (0, 0)),
                per_slot(num_heads, head_width),
                per_slot(kv_heads, head_width),
                per_slot(kv_heads, head_width),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=per_slot(num_heads, head_width),
            scratch_shapes=[
                pltpu.VMEM((2, columns, head_width), keys.dtype),
                pltpu.VMEM((2, columns, head_width), values.dtype),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, queries.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=target_platform() != "tpu",
        name="decode_attention",
    )(
        *schedule,
        _positions(num_heads, kv_heads, block),
        queries * head_width**-0.5,
        own_keys,
        own_values,
        keys.reshape(flat),
        values.reshape(flat),
    )


def _block_size(page_size: int, position_bytes: int) -> int:
    """Returns the positions of a block: a power of two that divides the page."""
    size = math.gcd(page_size, _LANES)
    while size > _SMALLEST_BLOCK and size * position_bytes > _BLOCK_BYTES:
        size //= 2
    return size


def _positions(num_heads: int, kv_heads: int, block: int) -> Int[np.ndarray, "H columns"]:
    """Returns the position in its block of each column of scores, out of reach where the head is another one's."""
    position, kv_head = np.divmod(np.arange(block * kv_heads), kv_heads)
    query_head = np.arange(num_heads)[:, None] // (num_heads // kv_heads)
    return np.where(kv_head == query_head, position, _ANOTHER_HEAD).astype(np.int32)


def _kernel(
    pages: Any,  # of the flattened cache: those of the first slot, those of the second, and so on
    lengths: Any,
    blocks_before: Any,  # blocks of all slots before this one: its parity says which buffer comes next
    next_filled: Any,  # entry n: the first slot from n on that has blocks; the number of slots where none has
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

    # The softmax begins with the token itself, which every token sees.
    found = scores(own_keys[0], positions[:, : own_keys.shape[1]] == 0)
    top = jnp.max(found, axis=1, keepdims=True)
    weights = jnp.exp(found - top)
    carry = top, jnp.sum(weights, axis=1, keepdims=True), mix(weights, own_values[0])
    _, total, mixed = jax.lax.fori_loop(0, count, one_block, carry)
    out[0] = (mixed / total).astype(out.dtype)
