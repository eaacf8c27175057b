"""The mesh of devices, and the rules that map the logical axes of the model to the axes of the mesh.

Models and losses refer to logical axes only.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from looplm_jax.config import MeshConfig, ModelConfig
from looplm_jax.errors import UserError
from looplm_jax.sharding.platform import require_platform
from looplm_jax.sharding.slices import arrange

# Maps each logical axis of a parameter or an activation to axes of the mesh. Parameters are sharded over `fsdp` and
# `context` along the model width, and over `tensor` along heads, feed-forward width and vocabulary. Activations are
# sharded along batch and sequence; their width is not sharded.
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


Axes = PartitionSpec | Sequence[str | None]  # logical axes of an array; None for an axis that is not sharded


# Meshes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config` describes.

    Args:
      config: the size of each axis. At most one may be -1, which takes the remaining devices.
      devices: the devices of the mesh; by default all.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    if devices is None:
        require_platform()
        devices = jax.devices()

    devices = list(devices)
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 not in sizes.values() and fixed < len(devices) and jax.process_count() == 1:
        devices = devices[:fixed]  # a single process may use some of its devices only

    free = len(devices) // fixed
    shape = tuple(free if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices) or free < 1:
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "data=1"
        raise UserError(
            f"a mesh of {wanted} does not fit {len(devices)} device(s); change mesh.* or set one axis to -1"
        )

    axis_types = (AxisType.Auto,) * len(shape)  # Flax Linen's logical constraints do not support Explicit axes

    grid = arrange(shape, devices)
    if grid is not None:
        return Mesh(grid, tuple(sizes), axis_types=axis_types)

    return jax.make_mesh(shape, tuple(sizes), axis_types=axis_types, devices=devices)


# Checks


def check_divides(mesh: Mesh, model: ModelConfig) -> None:
    """Raises UserError if an axis of the model is not divisible by the mesh axes that shard it."""
    wanted = (
        (("fsdp", "context"), "width", model.width),
        (("tensor",), "num_heads", model.num_heads),
        (("tensor",), "num_kv_heads", model.kv_heads),
        (("tensor",), "mlp_width", model.mlp_width),
        (("tensor",), "vocab_size", model.vocab_size),
        # In attention, `context` shards heads in exchange for positions.
        (("tensor", "context"), "num_heads", model.num_heads),
    )

    for axes, name, size in wanted:
        used = [axis for axis in axes if mesh.shape[axis] > 1]
        shares = math.prod(mesh.shape[axis] for axis in used)
        if size % shares:
            product = " x ".join(f"mesh.{axis}" for axis in used)
            raise UserError(f"{product}={shares} does not divide model.{name}={size}; change one of them")


def check_batch(mesh: Mesh, batch_size: int, accumulation: int, where: str) -> None:
    """Raises UserError if the sequences of a microbatch are not divisible by the devices that shard them."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size // accumulation % shares:
        raise UserError(
            f"{where}.batch_size={batch_size} in {accumulation} part(s) does not divide over "
            f"mesh.data x mesh.fsdp = {shares} devices; use a multiple of {shares * accumulation}"
        )


def check_sequence(mesh: Mesh, length: int, where: str) -> None:
    """Raises UserError if the length of a sequence is not divisible by the devices that shard it."""
    shares = mesh.shape["context"]
    if length % shares:
        raise UserError(
            f"{where}.sequence_length={length} does not divide over {shares} devices; "
            f"use a multiple of {shares}, or another {where}.context"
        )


# Shardings


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """A context manager that makes the model's logical constraints refer to this mesh, in this thread.

    The context must be active while a function is traced and while it runs.
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(LOGICAL_AXIS_RULES):
        yield


def abstract(boxed: PyTree, mesh: Mesh) -> PyTree:
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
    return NamedSharding(mesh, partition(None, "batch", "sequence"))


def partition(*axes: str | None) -> PartitionSpec:
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


def divides(shape: Sequence[int], spec: PartitionSpec) -> bool:
    """Whether an array of this shape is evenly divisible by this sharding on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    named = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in spec]
    shares = [math.prod(mesh.shape[name] for name in names) for names in named]
    return all(size % count == 0 for size, count in zip(shape, shares, strict=False))
