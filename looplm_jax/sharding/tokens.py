"""Functions that each device runs on its own tokens, followed by one sum over all devices.

Without this, the compiler sums over devices in every iteration of a loop over tokens, although one sum after the loop
is enough.
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

    # Read when the function is wrapped, in the mesh and the local region of the caller.
    devices = token_axes()
    return whole if devices else function  # type: ignore[return-value]
