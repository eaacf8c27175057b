"""Global arrays in a run of several processes: the sequences of each process, and copies on the host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from looplm_jax.sharding.mesh import batch_sharding, partition


def process_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the indices of the sequences of a batch that are on devices of this process, in ascending order.

    Args:
      mesh: the mesh.
      rows: the number of sequences of the global batch.
    """
    sharding = NamedSharding(mesh, partition("batch"))
    held: Any = sharding.addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held for row in range(*index[0].indices(rows))})


def place_rows(own: np.ndarray, mesh: Mesh, rows: int) -> Array:
    """Returns the global batch `[accumulation, sequences, positions]` as a sharded array.

    Args:
      own: the sequences of this process, those of `process_rows` in that order.
      mesh: the mesh.
      rows: the number of sequences of the global batch.
    """
    held = process_rows(mesh, rows)

    def shard(index: Any) -> np.ndarray:
        # `index` is the global slice of one device, `place` its start among the sequences of this process.
        first, after, _ = index[1].indices(rows)
        place = held.index(first)
        return own[index[0], place : place + after - first, index[2]]

    return jax.make_array_from_callback((own.shape[0], rows, own.shape[2]), batch_sharding(mesh), shard)


def to_host(tree: PyTree[Any]) -> PyTree[Any]:
    """Returns the arrays of a tree as whole NumPy arrays on every process. All processes must call this together."""

    def fetch(array: Any) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(fetch, tree)
