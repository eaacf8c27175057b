"""Functions that run on each device on its own shards, with explicit collectives.

Outside of them the compiler decides where gradients are summed over devices, and does so at every product: in every
iteration of every loop, although one sum after the loop is enough.
"""

from collections.abc import Callable
from typing import TypeVar

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PyTree, Shaped

from looplm_jax.sharding._logical_axes import (
    LOGICAL_AXIS_RULES,
    Axes,
    free_rules,
    is_divisible,
    logical_to_spec,
    mesh_axes,
)

F = TypeVar("F", bound=Callable[..., tuple[PyTree, PyTree]])
R = TypeVar("R")

_AXIS = "context"  # the mesh axis that shards positions


# Local regions: each device has whole parameters and its own tokens. `all_gather` and `reduce_scatter` are the only
# collectives along the mesh axes that shard tokens. The `tensor` axis is left to the compiler.


def token_axes() -> tuple[str, ...]:
    """Returns the mesh axes along which devices have different tokens; none inside a local region."""
    return () if jax.sharding.get_abstract_mesh().empty else mesh_axes(logical_to_spec("batch", "sequence"))


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


def all_gather(shard: Array, axes: Axes) -> Array:
    """Returns the whole array from its shards by all-gather. Must be called inside a local region."""
    for dimension, names in _sharded(axes):
        shard = jax.lax.all_gather(shard, names, axis=dimension, tiled=True)
    return shard


def reduce_scatter(array: Array, axes: Axes) -> Array:
    """Returns this device's shard of the sum of an array over all devices. Must be called inside a local region.

    Uses reduce-scatter along the axes that shard the array and an all-reduce along the remaining ones.
    """
    devices = _local_axes()
    for dimension, names in _sharded(axes):
        array = jax.lax.psum_scatter(array, names, scatter_dimension=dimension, tiled=True)
        devices = tuple(name for name in devices if name not in names)
    return jax.lax.psum(array, devices)


def all_reduce(sums: PyTree) -> PyTree:
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


# One function of tokens, followed by one sum over all devices


def shard_map_over_tokens(function: F, inputs: tuple[Axes, ...], outputs: Axes) -> F:
    """Returns `function` as a function that each device runs on its own tokens.

    Args:
      function: takes arrays and returns two trees: arrays of tokens, and sums over the tokens.
      inputs: the axes of each argument: `batch` and `sequence` for axes of tokens, None for any other.
      outputs: the axes of the arrays of tokens that it returns.

    Returns:
      A function of the global arrays whose sums are over all tokens. It is equivalent to `function` if there is no
      mesh, if the tokens are not evenly divisible by the mesh, and inside a local region, whose arrays are those of one
      device.
    """

    def whole(*arrays: Array) -> tuple[PyTree, PyTree]:
        specs = tuple(logical_to_spec(*axes) for axes in inputs)
        if not all(is_divisible(array.shape, spec) for array, spec in zip(arrays, specs, strict=True)):
            return function(*arrays)

        sums, own = on_each_device(local, inputs, outputs)(*arrays)
        return own, sums

    def local(*arrays: Array) -> tuple[PyTree, PyTree]:
        own, sums = function(*arrays)
        return all_reduce(sums), own

    # Read when the function is wrapped, in the mesh and the local region of the caller.
    return whole if token_axes() else function  # type: ignore[return-value]


# Context parallelism: several devices share a sequence, and each has a contiguous range of its positions.
#
# Attention needs whole sequences. An all-to-all before it exchanges positions for heads: each device gives its range of
# all heads and receives whole sequences of some heads (DeepSpeed-Ulysses, arXiv 2309.14509). All devices therefore do
# the same amount of work under a causal mask.


def sequence_shards() -> int:
    """Returns the number of devices that share a sequence in the current mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(_AXIS, 1)


def whole_length(length: int) -> int:
    """Returns the length of a whole sequence, given the length of an array in the traced code."""
    return length * sequence_shards() if _in_local_region() else length


def whole_sequences(x: Int[Array, "B s"]) -> Int[Array, "B S"]:
    """Returns an array of tokens with all positions of each sequence on every device that shares it."""
    if _in_local_region():
        return jax.lax.all_gather(x, _AXIS, axis=1, tiled=True)
    return nn.with_logical_constraint(x, ("batch", None))


def _in_local_region() -> bool:
    """Whether the code is traced inside a `shard_map` over the context axis."""
    return _AXIS in jax.sharding.get_abstract_mesh().manual_axes


def all_to_all_heads(x: Shaped[Array, "B s H Dh"]) -> Shaped[Array, "B S h Dh"]:
    """Exchanges a range of positions of all heads for all positions of some heads, by all-to-all.

    Must be called inside a `shard_map` over the context axis.
    """
    return jax.lax.all_to_all(x, _AXIS, split_axis=2, concat_axis=1, tiled=True)


def all_to_all_positions(x: Shaped[Array, "B S h Dh"]) -> Shaped[Array, "B s H Dh"]:
    """Exchanges all positions of some heads for a range of positions of all heads: the inverse."""
    return jax.lax.all_to_all(x, _AXIS, split_axis=1, concat_axis=2, tiled=True)
