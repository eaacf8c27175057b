"""Local regions of a program, in which each device computes on its own tokens and reductions are explicit.

Each device has whole parameters there. Outside of a local region the compiler decides where gradients are summed over
devices, and does so at every product: in every iteration of every loop. Inside, `gather` (all-gather) and `reduce`
(reduce-scatter) are the only collectives along the mesh axes that shard tokens. The `tensor` axis is left to the
compiler.
"""

from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from looplm_jax.sharding.mesh import LOGICAL_AXIS_RULES, Axes, free_rules, mesh_axes, partition

R = TypeVar("R")


def token_axes() -> tuple[str, ...]:
    """Returns the mesh axes along which devices have different tokens; none inside a local region."""
    return () if jax.sharding.get_abstract_mesh().empty else mesh_axes(partition("batch", "sequence"))


def on_each_device(
    function: Callable[..., tuple[R, PyTree]], in_axes: tuple[PyTree, ...], out_axes: PyTree
) -> Callable[..., tuple[R, PyTree]]:
    """Returns `function` as a local region.

    Args:
      function: runs on each device on its shards. It returns sums over all devices, which are the same on each device,
        and shards of arrays.
      in_axes: the logical axes of the arguments, one tree per argument.
      out_axes: the logical axes of the arrays whose shards it returns.
    """
    devices = token_axes()

    def specs(axes: PyTree) -> PyTree:
        return jax.tree.map(lambda names: _along(devices, names), axes, is_leaf=_is_axes)

    def local(*arguments: PyTree) -> tuple[R, PyTree]:
        # Logical constraints inside may not use the axes that are manual here.
        with nn.logical_axis_rules(free_rules()):
            return function(*arguments)

    return jax.shard_map(
        local,
        in_specs=tuple(map(specs, in_axes)),
        out_specs=(PartitionSpec(), specs(out_axes)),
        axis_names=set(devices),
        check_vma=False,
    )


def gather(shard: Array, axes: Axes) -> Array:
    """Returns the whole array from its shards by all-gather. Must be called inside a local region."""
    for dimension, names in _sharded(axes):
        shard = jax.lax.all_gather(shard, names, axis=dimension, tiled=True)
    return shard


def reduce(array: Array, axes: Axes) -> Array:
    """Returns this device's shard of the sum of an array over all devices. Must be called inside a local region.

    Uses reduce-scatter along the axes that shard the array and an all-reduce along the remaining ones.
    """
    devices = _local_axes()
    for dimension, names in _sharded(axes):
        array = jax.lax.psum_scatter(array, names, scatter_dimension=dimension, tiled=True)
        devices = tuple(name for name in devices if name not in names)
    return jax.lax.psum(array, devices)


def reduce_sums(sums: PyTree) -> PyTree:
    """Returns the all-reduced sums over the tokens of all devices. Must be called inside a local region."""
    return jax.lax.psum(sums, _local_axes())


def _local_axes() -> tuple[str, ...]:
    """Returns the mesh axes of the local region."""
    return jax.sharding.get_abstract_mesh().manual_axes


def _sharded(axes: Axes) -> list[tuple[int, tuple[str, ...]]]:
    """Returns each dimension that is sharded along axes of the local region, with those axes."""
    spec = _along(_local_axes(), axes)
    return [(dimension, names) for dimension, entry in enumerate(spec) if (names := mesh_axes(PartitionSpec(entry)))]


def _along(devices: tuple[str, ...], axes: Axes) -> PartitionSpec:
    """Returns the sharding of an array with these logical axes, restricted to some axes of the mesh."""
    spec = nn.logical_to_mesh_axes(tuple(axes), LOGICAL_AXIS_RULES) or PartitionSpec()
    entries = (mesh_axes(PartitionSpec(entry)) for entry in spec)
    return PartitionSpec(*(tuple(name for name in names if name in devices) or None for names in entries))


def _is_axes(node: PyTree) -> bool:
    """Whether a node is a tuple of logical axes, and thus a leaf."""
    return isinstance(node, PartitionSpec | tuple) and all(name is None or isinstance(name, str) for name in node)
