"""The logical axes of the model, and the shardings and global arrays that follow from them.

Models and losses refer to logical axes only.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

LOGICAL_AXIS_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("sequence", ("context",)),
    ("embed", ("fsdp", "context")),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("head_dim", ()),
    ("layers", ()),
    ("norm", ()),
    ("embed_in", ()),
    ("embed_activation", ()),
)
"""The mesh axes of each logical axis of a parameter or an activation.

Parameters are sharded over `fsdp` and `context` along the model width, and over `tensor` along heads, feed-forward
width and vocabulary. Activations are sharded along batch and sequence; their width is not sharded.
"""


Axes = PartitionSpec | Sequence[str | None]  # logical axes of an array; None for an axis that is not sharded


# Shardings


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """A context manager that makes the model's logical constraints refer to this mesh, in this thread.

    The context must be active while a function is traced and while it runs.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def abstract_arrays(boxed: PyTree, mesh: Mesh) -> PyTree:
    """Returns the shape, dtype and sharding of each leaf of a tree of abstract arrays.

    Args:
      boxed: a tree of shapes and dtypes. Parameters are boxed with their logical axis names.
      mesh: the mesh.
    """
    placed = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, LOGICAL_AXIS_RULES)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.meta.unbox(boxed),
        placed,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch `[accumulation, sequences, positions]`."""
    return NamedSharding(mesh, logical_to_spec(None, "batch", "sequence"))


def logical_to_spec(*axes: str | None) -> PartitionSpec:
    """Returns the sharding of an array with these logical axes. None is an axis that is not sharded.

    Inside a `shard_map` over some axes of the mesh, this is the sharding of one device's array over the other axes.
    """
    spec = nn.logical_to_mesh_axes(axes, free_rules())
    return PartitionSpec() if spec is None else spec


def free_rules() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns the rules without the mesh axes of an enclosing `shard_map`."""
    taken = jax.sharding.get_abstract_mesh().manual_axes
    return tuple((name, tuple(axis for axis in axes if axis not in taken)) for name, axes in LOGICAL_AXIS_RULES)


def mesh_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Returns the mesh axes that a sharding uses."""
    return tuple(name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry))


def is_divisible(shape: Sequence[int], spec: PartitionSpec) -> bool:
    """Whether an array of this shape is evenly divisible by this sharding on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    named = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    shards = [math.prod(mesh.shape[name] for name in names) for names in named]
    return all(size % count == 0 for size, count in zip(shape, shards, strict=False))


# Arrays of several processes


def process_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the indices of the sequences of a batch that are on devices of this process, in ascending order.

    Args:
      mesh: the mesh.
      rows: the number of sequences of the global batch.
    """
    sharding = NamedSharding(mesh, logical_to_spec("batch"))
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

    shape, sharding = (own.shape[0], rows, own.shape[2]), batch_sharding(mesh)
    indices = sharding.addressable_devices_indices_map(shape)
    # An explicit transfer, which a transfer guard allows. That of `make_array_from_callback` is implicit.
    shards = jax.device_put([shard(index) for index in indices.values()], list(indices))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def to_host(tree: PyTree[Any]) -> PyTree[Any]:
    """Returns the arrays of a tree as whole NumPy arrays on every process. All processes must call this together."""

    def fetch(array: Any) -> np.ndarray:
        if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(fetch, tree)
