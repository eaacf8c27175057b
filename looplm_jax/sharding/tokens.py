"""Work that each device does on its own tokens, with sums over all devices at its end.

Left to itself, the compiler adds up over the devices in every turn of a loop over tokens what is needed once, after it.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from looplm_jax.sharding.local import token_axes
from looplm_jax.sharding.mesh import Axes, divides, partition

F = TypeVar("F", bound=Callable[..., tuple[PyTree, PyTree]])


def on_own_tokens(function: F, inputs: tuple[Axes, ...], outputs: Axes) -> F:
    """`function`, run by each device on its own tokens. It gives arrays of tokens, and arrays that are sums over them.

    Args:
      function: what to run; takes arrays.
      inputs: axes of each argument: `batch` and `sequence` are those of tokens, None is any other.
      outputs: the same of the arrays of tokens that it gives.

    Returns:
      A function of the whole arrays, its sums over all tokens. It is `function` itself where there is no mesh, where
      tokens do not divide over it, and in a local region, whose arrays are those of one device.
    """

    def whole(*arrays: Array) -> tuple[PyTree, PyTree]:
        specs = tuple(partition(*axes) for axes in inputs)
        if not all(divides(array.shape, spec) for array, spec in zip(arrays, specs, strict=True)):
            return function(*arrays)
        mapped = jax.shard_map(
            local,
            in_specs=specs,
            out_specs=(partition(*outputs), PartitionSpec()),
            axis_names=set(devices),
            check_vma=False,
        )
        return mapped(*arrays)

    def local(*arrays: Array) -> tuple[PyTree, PyTree]:
        own, sums = function(*arrays)
        return own, jax.lax.psum(sums, devices)

    devices = token_axes()
    return whole if devices else function  # type: ignore[return-value]
