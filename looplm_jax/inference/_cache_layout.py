"""The layout of a cache: pages that the slots share, heads in the lanes of a TPU, and shardings over a mesh.

A TPU keeps the last axis of an array in lanes of 128. It gives an array of narrower heads another order of axes, and a
program that reads the cache in the order of the decode kernel then copies the whole cache first. Therefore heads of
fewer than 128 numbers are stored side by side, as many as fit in 128 lanes and divide the heads of a device; lanes that
are left over are zero. Attention to such a row is attention to one head if the query is zero in the lanes of the other
heads.

Arrays end in `[K, Dh]` for K heads of width Dh, and in `[R, W]` where they are stored. On other platforms the two are
the same, and the functions return their arguments.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, PyTree

from looplm_jax.sharding import target_platform, use_mesh

# Pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolSize:
    """The pages that all slots share, and the most pages of one request."""

    pages: int
    page_size: int  # positions of a page
    pages_per_slot: int

    @classmethod
    def of(cls, *, slots: int, capacity: int, page_size: int, pages: int | None = None) -> "PoolSize":
        """Returns the pool of an engine. The default has pages for a request of `capacity` tokens in every slot."""
        page_size = min(page_size, capacity)
        pages_per_slot = -(-capacity // page_size)
        pages = slots * pages_per_slot if pages is None else pages
        return cls(pages=pages, page_size=page_size, pages_per_slot=pages_per_slot)

    @property
    def positions(self) -> int:
        """The positions of all pages."""
        return self.pages * self.page_size

    def needed(self, tokens: int) -> int:
        """Returns the number of pages for `tokens` tokens."""
        return -(-tokens // self.page_size)


class PagePool:
    """The free and the reserved pages of a cache. Pages are reserved in the order in which they became free."""

    def __init__(self, pages: int):
        self._free = collections.deque(range(pages))
        self._reserved: set[int] = set()

    @property
    def free(self) -> int:
        """The number of free pages."""
        return len(self._free)

    def reserve(self, count: int) -> tuple[int, ...]:
        """Reserves and returns `count` pages. Raises OverflowError if fewer are free."""
        if count > self.free:
            raise OverflowError(f"{count} pages are wanted and {self.free} are free")
        pages = tuple(self._free.popleft() for _ in range(count))
        self._reserved.update(pages)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Frees reserved pages. Raises ValueError, and frees none, unless all of them are reserved."""
        if len(set(pages)) != len(pages) or not self._reserved.issuperset(pages):
            raise ValueError(f"of the pages {list(pages)} some are not reserved")
        self._reserved.difference_update(pages)
        self._free.extend(pages)


# Heads in lanes


LANES = 128  # of a vector register of a TPU


def stored_heads(kv_heads: int, head_width: int) -> tuple[int, int]:
    """Returns R and W for the platform and the mesh of the program that is being traced."""
    if target_platform() != "tpu":
        return kv_heads, head_width
    return in_lanes(kv_heads, head_width, devices=_devices_of_heads())


def in_lanes(kv_heads: int, head_width: int, *, devices: int = 1) -> tuple[int, int]:
    """Returns R and W on TPUs. R is a multiple of `devices`, among which the heads are divided."""
    heads_of_device = kv_heads // devices
    most = max(LANES // head_width, 1)
    side_by_side = max(count for count in range(1, most + 1) if heads_of_device % count == 0)
    return kv_heads // side_by_side, -(-side_by_side * head_width // LANES) * LANES


def store_heads(heads: Float[Array, "*B K Dh"], stored: tuple[int, ...]) -> Float[Array, "*B R W"]:
    """Returns heads in the layout of a cache; `stored` is its shape, or the last two axes of it."""
    rows, width = stored[-2:]
    return _pad(heads.reshape(*heads.shape[:-2], rows, -1), width)


def load_heads(stored: Float[Array, "*B R W"], heads: tuple[int, ...]) -> Float[Array, "*B K Dh"]:
    """Returns stored keys or values as heads; `heads` is `(K, Dh)`, or a shape that ends in them."""
    kv_heads, head_width = heads[-2:]
    used = kv_heads // stored.shape[-2] * head_width
    return stored[..., :used].reshape(*stored.shape[:-2], kv_heads, head_width)


def at_positions(stored: Float[Array, "*B R W"], *index: Any) -> Any:
    """Returns `stored.at[*index]`, where slices of whole axes come before indices, and neither covers R and W.

    If a device has one row of heads, indices replace the slices. XLA brings an array that is updated in windows of
    several axes into a layout in which these axes are in the tiles, which would copy the whole cache.
    """
    if not is_one_row(stored.shape):
        return stored.at[index]

    sliced = sum(isinstance(each, slice) for each in index)
    indices = jnp.broadcast_arrays(*index[sliced:])
    axes = jnp.ix_(*[jnp.arange(size) for size in stored.shape[:sliced]])
    return stored.at[*(axis.reshape(axis.shape + (1,) * indices[0].ndim) for axis in axes), *indices]


def is_one_row(stored: tuple[int, ...]) -> bool:
    """Returns whether each device has one row of heads. `stored` is the shape of a cache, or the last two axes of it.

    The tiles of such a cache have positions and lanes. With several rows they have rows and lanes.
    """
    return stored[-2] <= _devices_of_heads()


def spread_queries(queries: Float[Array, "*B H Dh"], kv_heads: int, stored: tuple[int, ...]) -> Float[Array, "*B H W"]:
    """Returns queries in the lanes of the key head that each attends to, and zeros in the other lanes of its row."""
    rows, width = stored[-2:]
    if width == queries.shape[-1]:
        return queries
    own = _own_place(queries.shape[-2], kv_heads, kv_heads // rows, ndim=queries.ndim + 1)
    spread = jnp.where(own, queries[..., None, :], 0)
    return _pad(spread.reshape(*queries.shape[:-1], -1), width)


def own_mixtures(mixed: Float[Array, "*B H W"], rows: int, heads: tuple[int, ...]) -> Float[Array, "*B H Dh"]:
    """Returns, of what each query mixed of rows of values, the lanes of its own head; `heads` ends in `(K, Dh)`."""
    kv_heads, head_width = heads[-2:]
    if mixed.shape[-1] == head_width:
        return mixed
    num_heads, side_by_side = mixed.shape[-2], kv_heads // rows
    of_heads = mixed[..., : side_by_side * head_width].reshape(*mixed.shape[:-1], side_by_side, head_width)
    own = _own_place(num_heads, kv_heads, side_by_side, ndim=of_heads.ndim)
    return jnp.sum(jnp.where(own, of_heads, 0), axis=-2)


def _devices_of_heads() -> int:
    """Returns the number of devices that the heads of the program being traced are divided among."""
    return jax.sharding.get_abstract_mesh().shape.get("tensor", 1)


def _own_place(num_heads: int, kv_heads: int, side_by_side: int, *, ndim: int) -> Bool[Array, "*B H side_by_side 1"]:
    """Returns where in its row the key head of each query head is, with leading axes of size 1."""
    kv_head = jnp.arange(num_heads) // (num_heads // kv_heads)
    own = kv_head[:, None] % side_by_side == jnp.arange(side_by_side)[None]
    return own.reshape(*[1] * (ndim - 3), *own.shape, 1)


def _pad(rows: Float[Array, "*B w"], width: int) -> Float[Array, "*B W"]:
    missing = width - rows.shape[-1]
    return jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, missing)]) if missing else rows


# Shardings


T = TypeVar("T")


def use_mesh_or_none(mesh: Mesh | None) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which the model's logical axes map to the mesh; without a mesh, it does nothing."""
    return contextlib.nullcontext() if mesh is None else use_mesh(mesh)


def init_sharded(make: Callable[[], T], mesh: Mesh | None) -> T:
    """Returns `make()`, created with its shardings. Arrays of six axes are keys and values, `[L, P, N, C, K, Dh]`."""
    return make() if mesh is None else jax.jit(make, out_shardings=shardings(jax.eval_shape(make), mesh))()


def shard(tree: T, mesh: Mesh | None) -> T:
    """Returns existing arrays, moved to their shardings."""
    return tree if mesh is None else jax.device_put(tree, shardings(tree, mesh))


def constrain(tree: T) -> T:
    """Constrains the results of a program to their shardings.

    Otherwise XLA chooses, and the next program is recompiled.
    """
    # Without a mesh there is nothing to choose.
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, _spec(leaf)), tree)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Returns the sharding of each array of a tree, which may be abstract."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _spec(leaf)), tree)


def _spec(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    """Returns the partition of an array: only the axis of heads, the fifth of six, is sharded."""
    return PartitionSpec(None, None, None, None, "tensor") if leaf.ndim == 6 else PartitionSpec()
