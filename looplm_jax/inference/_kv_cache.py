"""The key-value cache of a decoder: a plane for each loop, or planes that loops share (paper v4, section 5.4.2).

A decoded token at loop t attends to the plane of loop t of earlier positions, and to its own keys and values of loop t.
The tokens of one prompt attend to the loop-t keys and values of one another under every strategy (`_prefill`). The
strategies differ in what the cache keeps of a position:

    FULL      plane t keeps loop t; planes after the exit keep the last loop that ran ("last exited")
    LAST      the last loop that ran
    AVERAGE   the mean of the loops that ran
    FIRST     the first loop
    ring(k)   the last k loops: loop t uses plane (t - 1) mod k; `LAST` is ring(1)

A row is the cache of one sequence. Rows share memory in pages. A page has the same few positions of every layer and
plane, so one table `[N, W]` locates a row in all of them. Within a layer and plane a page is contiguous, as the decode
kernel reads it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import ModelConfig
from looplm_jax.inference._cache_attention import PastView
from looplm_jax.inference._cache_layout import PoolSize, at_positions, store_heads, stored_heads
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.models._blocks import Context, KeyValues, make_context
from looplm_jax.models._looplm import ModelCache

# Fewer positions would save little and add programs.
_SMALLEST_BUCKET = 64


@flax.struct.dataclass
class Cache:
    """Keys and values of N rows. Row n has tokens at positions `0 .. lengths[n] - 1`; later positions are not read.

    Keys and values are `[L, P, M, c, R, W]`: L layers, P planes, M pages of c positions, and the K heads of a position
    as `_cache_layout` stores them. A prelude has one plane. Position p of row n is position `p % c` of page
    `table[n, p // c]`; table entries without a page are M. Without a table, row n is page n.
    """

    planes: ModelCache
    lengths: Int[Array, "N"]
    strategy: CacheStrategy = flax.struct.field(pytree_node=False)
    table: Int[Array, "N W"] | None = None

    @property
    def pages(self) -> int:
        """The number of pages, M."""
        return self.planes.core.keys.shape[2]

    @property
    def page_size(self) -> int:
        """The positions of a page, c."""
        return self.planes.core.keys.shape[3]

    @property
    def page_table(self) -> Int[Array, "N W"]:
        """The page numbers of each row."""
        return jnp.arange(self.rows)[:, None] if self.table is None else self.table

    @property
    def capacity(self) -> int:
        """The positions that a row has room for, C."""
        return self.page_size * (1 if self.table is None else self.table.shape[1])

    @property
    def depth(self) -> int:
        """The planes of the core, P: the loops of a full cache, those of a ring, or 1."""
        return self.planes.core.keys.shape[1]

    @property
    def rows(self) -> int:
        """The number of rows, N."""
        return self.lengths.size

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values: `pages * page_size * bytes_per_token(...)`, and unused lanes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.planes))

    def context(self, config: ModelConfig, tokens: int = 1) -> Context:
        """Returns positions and masks of the next `tokens` tokens of each row among themselves.

        `past` and `past_prelude` return what these tokens see of the cache.
        """
        positions = self.lengths[:, None] + jnp.arange(tokens)[None]
        return make_context(config, positions, jnp.ones_like(positions))

    def past(
        self,
        stacked: KeyValues | None,
        loops_done: Int[Array, "N"],
        dtype: DTypeLike,
        *,
        differentiable: bool = False,
    ) -> PastView | None:
        """Returns the view of core or coda that each row reads in the loop after `loops_done`; None if `stacked` is."""
        # A full cache may have fewer planes than the loops of a policy; later loops read the last one.
        planes = loops_done % self.depth if self.strategy.shares else jnp.minimum(loops_done, self.depth - 1)
        return self._view(stacked, planes, dtype, differentiable)

    def past_prelude(self, dtype: DTypeLike, *, differentiable: bool = False) -> PastView | None:
        """Returns the view of the prelude that each row reads; None without a prelude."""
        return self._view(self.planes.prelude, jnp.zeros_like(self.lengths), dtype, differentiable)

    def _view(
        self, stacked: KeyValues | None, planes: Int[Array, "N"], dtype: DTypeLike, differentiable: bool
    ) -> PastView | None:
        # A model without coda or prelude has no such keys.
        if stacked is None:
            return None
        return PastView(
            stacked=stacked,
            planes=planes,
            table=self.page_table,
            lengths=self.lengths,
            dtype=dtype,
            differentiable=differentiable,
        )

    def places(self, rows: Int[Array, "*B"], positions: Int[Array, "*B"]) -> tuple[Int[Array, "*B"], Int[Array, "*B"]]:
        """Returns the page of each position of a row, M beyond the capacity, and the offset in that page."""
        # Page M does not exist. Reads of it are filled, and writes to it are dropped, so no branch is needed.
        number, offset = jnp.divmod(positions, self.page_size)
        return self.page_table.at[rows, number].get(mode="fill", fill_value=self.pages), offset

    def write(self, own: ModelCache, loops_done: Int[Array, "N"], active: Bool[Array, "N"]) -> "Cache":
        """Returns the cache with one more loop of the token at the next position of each active row.

        Every loop of the token writes the same position, until `advance` makes it part of the row.

        Args:
          own: keys and values of the token, `[L, N, 1, K, Dh]`.
          loops_done: loops that the token of each row ran before this one.
          active: rows to write; the others stay as they are.
        """

        def put(whole: Array, new: Array) -> Array:
            return self._put(whole, store_heads(new[:, :, 0], whole.shape), loops_done, active)

        core = jax.tree.map(put, self.planes.core, own.core)
        coda = None if own.coda is None else jax.tree.map(put, self.planes.coda, own.coda)

        # The prelude runs once per token, so it is written in the first loop only.
        prelude = self.planes.prelude
        if own.prelude is not None:
            pages, offsets = self._next_places(active & (loops_done == 0))

            def put_once(whole: Array, new: Array) -> Array:
                stored = store_heads(new[:, :, 0], whole.shape).astype(whole.dtype)
                return at_positions(whole, slice(None), 0, pages, offsets).set(stored, mode="drop")

            prelude = jax.tree.map(put_once, prelude, own.prelude)

        return dataclasses.replace(self, planes=ModelCache(core=core, prelude=prelude, coda=coda))

    def advance(self, count: Int[Array, "N"]) -> "Cache":
        """Returns the cache with rows that are `count` positions longer."""
        return dataclasses.replace(self, lengths=self.lengths + count)

    def emptied(self, rows: Bool[Array, "N"]) -> "Cache":
        """Returns the cache with length 0 for some rows, which attention then skips."""
        return dataclasses.replace(self, lengths=jnp.where(rows, 0, self.lengths))

    def _next_places(self, written: Bool[Array, "*P N"]) -> tuple[Int[Array, "*P N"], Int[Array, "N"]]:
        """Returns page and offset of the next position of each row; page M, which drops the write, if not `written`."""
        # `lengths` is the number of finished tokens, which is the position of the one that is being decoded.
        pages, offsets = self.places(jnp.arange(self.rows), self.lengths)
        return jnp.where(written, jnp.broadcast_to(pages, written.shape), self.pages), offsets

    def _put(
        self,
        whole: Float[Array, "L P M c R W"],
        new: Float[Array, "L N R W"],
        loops_done: Int[Array, "N"],
        active: Bool[Array, "N"],
    ) -> Float[Array, "L P M c R W"]:
        if self.strategy == CacheStrategy.FIRST:
            # Later loops would overwrite what `FIRST` keeps.
            active = active & (loops_done == 0)

        planes = jnp.arange(self.depth)[:, None]
        # Idle rows are not written, nor are the planes of loops that the token has left behind.
        written = planes >= loops_done[None]
        if self.strategy.shares:
            written |= planes == loops_done[None] % self.depth
        pages, offsets = self._next_places(active[None] & written)
        if self.strategy == CacheStrategy.AVERAGE:
            # The running mean of the loops so far: m_t = m_(t-1) + (x_t - m_(t-1)) / t, in float32.
            old = at_positions(whole, slice(None), 0, pages[0], offsets).get(mode="fill", fill_value=0)
            before = old.astype(jnp.float32)
            share = 1.0 / (loops_done + 1).astype(jnp.float32)
            new = before + (new.astype(jnp.float32) - before) * share[None, :, None, None]

        # A token may exit at any loop, so each loop writes its own plane and all later ones ("last exited").
        spread = jnp.broadcast_to(new[:, None], (new.shape[0], self.depth, *new.shape[1:])).astype(whole.dtype)
        return at_positions(whole, slice(None), planes, pages, offsets).set(spread, mode="drop")


def empty_cache(
    config: ModelConfig,
    strategy: CacheStrategy,
    *,
    rows: int,
    capacity: int,
    loops: int,
    dtype: DTypeLike,
    in_lanes: bool = True,
) -> Cache:
    """Returns a cache of `rows` empty rows of one page each, for tokens of up to `loops` loops.

    With `in_lanes=False` heads are stored as `[K, Dh]` on a TPU too, as gradients need them.
    """
    # Without a table, row n is page n.
    stored = stored_heads(config.kv_heads, config.head_width) if in_lanes else (config.kv_heads, config.head_width)
    return Cache(
        planes=_no_tokens(config, strategy, rows, capacity, loops, dtype, stored),
        lengths=jnp.zeros(rows, jnp.int32),
        strategy=strategy,
    )


def empty_pool(
    config: ModelConfig, strategy: CacheStrategy, size: PoolSize, *, rows: int, loops: int, dtype: DTypeLike
) -> Cache:
    """Returns a cache of `rows` empty rows without pages, over the pages of a pool."""
    stored = stored_heads(config.kv_heads, config.head_width)
    return Cache(
        planes=_no_tokens(config, strategy, size.pages, size.page_size, loops, dtype, stored),
        lengths=jnp.zeros(rows, jnp.int32),
        strategy=strategy,
        table=jnp.full((rows, size.pages_per_slot), size.pages, jnp.int32),
    )


def _no_tokens(
    config: ModelConfig,
    strategy: CacheStrategy,
    pages: int,
    page_size: int,
    loops: int,
    dtype: DTypeLike,
    stored: tuple[int, int],
) -> ModelCache:
    def planes(layers: int, count: int) -> KeyValues | None:
        shape = (layers, count, pages, page_size, *stored)
        return KeyValues(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype)) if layers else None

    # A coda runs in every loop, as the core does; a prelude runs once.
    depth = strategy.planes(loops)
    core = planes(config.num_layers, depth)
    assert core is not None
    return ModelCache(core=core, prelude=planes(config.prelude_layers, 1), coda=planes(config.coda_layers, depth))


def bytes_per_token(config: ModelConfig, strategy: CacheStrategy, *, loops: int, dtype: DTypeLike) -> int:
    """Returns the bytes of one position: `2 * planes * layers * K * Dh * itemsize`, with one plane of the prelude."""
    # The prelude has one plane under every strategy.
    planes = strategy.planes(loops)
    layers = config.prelude_layers + planes * (config.num_layers + config.coda_layers)
    return 2 * layers * config.kv_heads * config.head_width * jnp.dtype(dtype).itemsize


def share(full: Cache, strategy: CacheStrategy) -> Cache:
    """Returns a full cache of tokens that ran all loops as `strategy` keeps it."""
    loops = full.depth

    def keep(stacked: Float[Array, "L P M c R W"]) -> Float[Array, "L p M c R W"]:
        match strategy:
            case CacheStrategy.FULL:
                return stacked
            case CacheStrategy.AVERAGE:
                # In float32, like the running mean of decoded tokens.
                return jnp.mean(stacked, axis=1, keepdims=True, dtype=jnp.float32).astype(stacked.dtype)
            case CacheStrategy.FIRST:
                return stacked[:, :1]
            case _:
                # The last loops, each in its own plane.
                planes = strategy.planes(loops)
                return jnp.roll(stacked[:, -planes:], loops % planes, axis=1)

    core, coda = jax.tree.map(keep, (full.planes.core, full.planes.coda))
    planes = dataclasses.replace(full.planes, core=core, coda=coda)
    return dataclasses.replace(full, planes=planes, strategy=strategy)


def bucket(length: int, longest: int) -> int:
    """Returns the static size for `length` positions: a power of two, at least 64 and at most `longest`."""
    # Powers of two take at most twice the memory, and the number of programs grows with the logarithm of the length.
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), longest)
