"""Whole copies of weights that the mesh spreads over devices, made once and used by every loop.

All loops use the same weights. Left to itself, a program gathers each layer's shares again in every loop, forward and
backward. The copies come in beside the parameters, as a collection of the same names; gradients go to the parameters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

COLLECTION = "gathered"


def gather(params: Any, axes: Any, dtype: DTypeLike) -> Any:
    """Copies in `dtype`, cut no more along the model width.

    Args:
      params: a tree of float32 parameters.
      axes: the logical names of each one's axes.
      dtype: what matrices are multiplied in.
    """

    def whole(weight: Array, names: PartitionSpec) -> Array:
        kept = tuple(None if name == "embed" else name for name in names)
        return nn.with_logical_constraint(jax.lax.stop_gradient(weight).astype(dtype), kept)

    return jax.tree.map(whole, params, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def use_copy(parameter: Float[Array, "..."], copy: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
    """`copy`, whose gradient is that of `parameter`: added up in float32, and cut as it is."""
    del parameter, axes
    return copy


def _forward(parameter: Array, copy: Array, axes: tuple[str, ...]) -> tuple[Array, None]:
    del parameter, axes
    return copy, None


def _backward(axes: tuple[str, ...], saved: None, cotangent: Array) -> tuple[Array, None]:
    del saved
    return nn.with_logical_constraint(cotangent, axes).astype(jnp.float32), None


use_copy.defvjp(_forward, _backward)
