"""What one process of many holds of a global array, and how it sees the rest."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from looplm_jax.sharding.mesh import batch_sharding, partition


def process_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of the rows of a batch `[parts, rows, positions]` lie on devices of this process, ascending."""
    sharding = NamedSharding(mesh, partition("batch"))
    held: Any = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held for row in range(*index[0].indices(rows))})


def place_rows(own: np.ndarray, mesh: Mesh, rows: int) -> Array:
    """The global batch `[parts, rows, positions]` of which this process gives its `process_rows`."""
    held = process_rows(mesh, rows)

    def shard(index: Any) -> np.ndarray:
        first, after, _ = index[1].indices(rows)
        place = held.index(first)
        return own[index[0], place : place + after - first, index[2]]

    return jax.make_array_from_callback((own.shape[0], rows, own.shape[2]), batch_sharding(mesh), shard)


def to_host(tree: PyTree[Any]) -> PyTree[Any]:
    """The arrays of a tree as NumPy arrays, whole on every process. All processes must call this together."""

    def fetch(array: Any) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(fetch, tree)
