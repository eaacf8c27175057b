"""Copies of sharded parameters, all-gathered once and used by every loop.

All loops use the same weights. By default, a program all-gathers the shards of each layer again in every loop, forward
and backward. The copies are passed beside the parameters, as a collection with the same names. Gradients go to the
parameters, whose values are not read.
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
    """Returns copies in `dtype` that are no longer sharded along the model width.

    Args:
      params: a tree of float32 parameters.
      axes: the logical names of the axes of each parameter.
      dtype: the dtype of the matrix products.
    """

    def whole(weight: Array, names: PartitionSpec) -> Array:
        kept = tuple(None if name == "embed" else name for name in names)
        return nn.with_logical_constraint(jax.lax.stop_gradient(weight).astype(dtype), kept)

    return jax.tree.map(whole, params, axes)


def use_copy(parameter: Float[Array, "..."], copy: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
    """Returns `copy`, whose gradient goes to `parameter`: summed in its dtype, and sharded like it."""
    return _use_copy(parameter, copy, axes, parameter.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _use_copy(parameter: Array, copy: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> Array:
    del parameter, axes, dtype
    return copy


def _forward(parameter: Array, copy: Array, axes: tuple[str, ...], dtype: jnp.dtype) -> tuple[Array, None]:
    del parameter, axes, dtype
    return copy, None


def _backward(axes: tuple[str, ...], dtype: jnp.dtype, saved: None, cotangent: Array) -> tuple[Array, None]:
    del saved
    return nn.with_logical_constraint(cotangent, axes).astype(dtype), None


_use_copy.defvjp(_forward, _backward)
