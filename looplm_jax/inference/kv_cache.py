"""The cache of a decoder: keys and values of N rows, with a plane for each loop or one plane for all (paper v4, 5.4.2).

A prompt always runs through all T planes (`FULL`). A decoded token at loop t reads, of earlier positions, plane t of a
full cache, or the one plane there is; of its own position, its own keys and values. What a position keeps:

    FULL      plane t holds loop t; the planes below the exit take its last loop ("last exited")
    LAST      its last loop
    AVERAGE   the mean of its loops
    FIRST     its first loop

Rows share the memory in pages: a page is a few positions of every layer and plane, so one table, `[N, W]`, says where a
row is in all of them. In each layer and plane a page is contiguous, as a kernel reads it; a tick moves the bytes that
it would move for rows in one piece.
"""

import dataclasses
import enum

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import ModelConfig
from looplm_jax.inference.cache_attention import PastView
from looplm_jax.inference.page_pool import PoolSize
from looplm_jax.models.blocks import Context, KeyValues, make_context
from looplm_jax.models.looplm import ModelCache

_SMALLEST_BUCKET = 64


class CacheStrategy(enum.Enum):
    """Which loops of a decoded token the cache keeps."""

    FULL = "full"
    LAST = "last"
    AVERAGE = "average"
    FIRST = "first"

    @property
    def shares(self) -> bool:
        """Whether all loops read one plane."""
        return self is not CacheStrategy.FULL


@flax.struct.dataclass
class Cache:
    """Row n holds tokens at positions `0 .. lengths[n] - 1`; what lies behind them is never looked at.

    Keys and values are `[L, P, M, c, K, Dh]` for P planes and M pages of c positions; a prelude has one plane. Position
    p of row n is position `p % c` of page `table[n, p // c]`; entries beyond what a row may fill are M, not a page.
    Without a table row n is page n, as long as the row.
    """

    planes: ModelCache
    lengths: Int[Array, "N"]
    strategy: CacheStrategy = flax.struct.field(pytree_node=False)
    table: Int[Array, "N W"] | None = None

    @property
    def pages(self) -> int:
        """Pages of all rows, M."""
        return self.planes.core.keys.shape[2]

    @property
    def page_size(self) -> int:
        """Positions of a page, c."""
        return self.planes.core.keys.shape[3]

    @property
    def page_table(self) -> Int[Array, "N W"]:
        """The pages of each row."""
        return jnp.arange(self.rows)[:, None] if self.table is None else self.table

    @property
    def capacity(self) -> int:
        """Positions of a row, C."""
        return self.page_size * (1 if self.table is None else self.table.shape[1])

    @property
    def depth(self) -> int:
        """Planes of the core, P: the loops of a full cache, or 1."""
        return self.planes.core.keys.shape[1]

    @property
    def rows(self) -> int:
        """Rows, N."""
        return self.lengths.size

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values: `pages * page_size * bytes_per_token(...)`."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.planes))

    def context(self, config: ModelConfig, tokens: int = 1) -> Context:
        """What the next `tokens` tokens of each row see of one another; a view of the cache shows what is before."""
        positions = self.lengths[:, None] + jnp.arange(tokens)
        return make_context(config, positions, jnp.ones_like(positions))

    def past(
        self,
        stacked: KeyValues | None,
        loops_done: Int[Array, "N"],
        dtype: DTypeLike,
        *,
        differentiable: bool = False,
    ) -> PastView | None:
        """What each row reads of core or coda, in the loop that follows `loops_done`."""
        planes = jnp.zeros_like(loops_done) if self.strategy.shares else jnp.minimum(loops_done, self.depth - 1)
        return self._view(stacked, planes, dtype, differentiable)

    def past_prelude(self, dtype: DTypeLike, *, differentiable: bool = False) -> PastView | None:
        """What each row reads of the prelude."""
        return self._view(self.planes.prelude, jnp.zeros_like(self.lengths), dtype, differentiable)

    def _view(
        self, stacked: KeyValues | None, planes: Int[Array, "N"], dtype: DTypeLike, differentiable: bool
    ) -> PastView | None:
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
        """Returns the page that holds each position of a row, and where in it; M for positions beyond the capacity."""
        number, offset = jnp.divmod(positions, self.page_size)
        return self.page_table.at[rows, number].get(mode="fill", fill_value=self.pages), offset

    def write(self, own: ModelCache, loops_done: Int[Array, "N"], active: Bool[Array, "N"]) -> "Cache":
        """The keys and values of the next position of each active row, `[L, N, 1, K, Dh]`, after one more loop.

        Written again at each loop of the token, until `advance` makes the position part of the row.
        """

        def put(whole: Array, new: Array) -> Array:
            return self._put(whole, new[:, :, 0], loops_done, active)

        core = jax.tree.map(put, self.planes.core, own.core)
        coda = None if own.coda is None else jax.tree.map(put, self.planes.coda, own.coda)
        prelude = self.planes.prelude
        if own.prelude is not None:
            pages, offsets = self._next_places(active & (loops_done == 0))
            prelude = jax.tree.map(
                lambda whole, new: whole.at[:, 0, pages, offsets].set(new[:, :, 0].astype(whole.dtype), mode="drop"),
                prelude,
                own.prelude,
            )
        return dataclasses.replace(self, planes=ModelCache(core=core, prelude=prelude, coda=coda))

    def advance(self, count: Int[Array, "N"]) -> "Cache":
        """The cache with `count` more positions in each row."""
        return dataclasses.replace(self, lengths=self.lengths + count)

    def emptied(self, rows: Bool[Array, "N"]) -> "Cache":
        """The cache as if some rows held no tokens, so that these are not read."""
        return dataclasses.replace(self, lengths=jnp.where(rows, 0, self.lengths))

    def _next_places(self, written: Bool[Array, "*P N"]) -> tuple[Int[Array, "*P N"], Int[Array, "N"]]:
        """Where the next position of each row is. What is not written has no page, so that it is dropped."""
        pages, offsets = self.places(jnp.arange(self.rows), self.lengths)
        return jnp.where(written, pages, self.pages), offsets

    def _put(
        self,
        whole: Float[Array, "L P M c K Dh"],
        new: Float[Array, "L N K Dh"],
        loops_done: Int[Array, "N"],
        active: Bool[Array, "N"],
    ) -> Float[Array, "L P M c K Dh"]:
        if self.strategy is CacheStrategy.FIRST:
            active = active & (loops_done == 0)
        planes = jnp.arange(self.depth)[:, None]
        # Not written: rows without work, and the planes of loops that a token has done before.
        pages, offsets = self._next_places(active & (self.strategy.shares | (planes >= loops_done)))
        if self.strategy is CacheStrategy.AVERAGE:
            before = whole.at[:, 0, pages[0], offsets].get(mode="fill", fill_value=0).astype(jnp.float32)
            share = 1.0 / (loops_done + 1).astype(jnp.float32)
            new = before + (new.astype(jnp.float32) - before) * share[:, None, None]
        spread = jnp.broadcast_to(new[:, None], (new.shape[0], self.depth, *new.shape[1:])).astype(whole.dtype)
        return whole.at[:, planes, pages, offsets].set(spread, mode="drop")


def empty_cache(
    config: ModelConfig, strategy: CacheStrategy, *, rows: int, capacity: int, loops: int, dtype: DTypeLike
) -> Cache:
    """Returns a cache of `rows` rows without tokens, each in one piece, for tokens of up to `loops` loops."""
    return Cache(
        planes=_no_tokens(config, strategy, rows, capacity, loops, dtype),
        lengths=jnp.zeros(rows, jnp.int32),
        strategy=strategy,
    )


def empty_pool(
    config: ModelConfig, strategy: CacheStrategy, size: PoolSize, *, rows: int, loops: int, dtype: DTypeLike
) -> Cache:
    """Returns a cache of `rows` rows that share the pages of a pool and have none yet."""
    return Cache(
        planes=_no_tokens(config, strategy, size.pages, size.page_size, loops, dtype),
        lengths=jnp.zeros(rows, jnp.int32),
        strategy=strategy,
        table=jnp.full((rows, size.pages_per_slot), size.pages, jnp.int32),
    )


def _no_tokens(
    config: ModelConfig, strategy: CacheStrategy, pages: int, page_size: int, loops: int, dtype: DTypeLike
) -> ModelCache:
    def planes(layers: int, count: int) -> KeyValues | None:
        shape = (layers, count, pages, page_size, config.kv_heads, config.head_width)
        return KeyValues(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype)) if layers else None

    depth = 1 if strategy.shares else loops
    core = planes(config.num_layers, depth)
    assert core is not None
    return ModelCache(core=core, prelude=planes(config.prelude_layers, 1), coda=planes(config.coda_layers, depth))


def bytes_per_token(config: ModelConfig, strategy: CacheStrategy, *, loops: int, dtype: DTypeLike) -> int:
    """Bytes that one position takes: `2 * planes * layers * K * Dh * itemsize`, and the prelude once."""
    planes = 1 if strategy.shares else loops
    layers = config.prelude_layers + planes * (config.num_layers + config.coda_layers)
    return 2 * layers * config.kv_heads * config.head_width * jnp.dtype(dtype).itemsize


def share(full: Cache, strategy: CacheStrategy) -> Cache:
    """A full cache as `strategy` keeps it: the last plane, the mean of the planes, or the first one."""

    def keep(stacked: Float[Array, "L P M c K Dh"]) -> Float[Array, "L p M c K Dh"]:
        match strategy:
            case CacheStrategy.FULL:
                return stacked
            case CacheStrategy.LAST:
                return stacked[:, -1:]
            case CacheStrategy.AVERAGE:
                return jnp.mean(stacked, axis=1, keepdims=True, dtype=jnp.float32).astype(stacked.dtype)
            case CacheStrategy.FIRST:
                return stacked[:, :1]

    core, coda = jax.tree.map(keep, (full.planes.core, full.planes.coda))
    planes = dataclasses.replace(full.planes, core=core, coda=coda)
    return dataclasses.replace(full, planes=planes, strategy=strategy)


def unshare(shared: Cache, loops: int) -> Cache:
    """A cache with a plane for each of `loops` loops, to prefill on: the one plane, as often as needed."""
    if not shared.strategy.shares:
        return shared

    def repeat(stacked: Float[Array, "L p M c K Dh"]) -> Float[Array, "L P M c K Dh"]:
        return jnp.repeat(stacked, loops, axis=1)

    core, coda = jax.tree.map(repeat, (shared.planes.core, shared.planes.coda))
    planes = dataclasses.replace(shared.planes, core=core, coda=coda)
    return dataclasses.replace(shared, planes=planes, strategy=CacheStrategy.FULL)


def bucket(length: int, longest: int) -> int:
    """The static size for `length` positions: a power of two from 64 up, or `longest` where that is less."""
    return min(max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length()), longest)
