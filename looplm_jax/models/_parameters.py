"""Parameters: how modules create and read them, and copies that are all-gathered once for all loops.

All loops use the same weights. By default, a program all-gathers the shards of each layer again in every loop, forward
and backward. The copies are passed beside the parameters, as a collection with the same names. Gradients go to the
parameters, whose values are not read.
"""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from looplm_jax.config import Initializer, ModelConfig
from looplm_jax.sharding import target_platform

GATHERED = "gathered"  # the collection of the copies


# Gathered copies


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


# Parameters and projections


def parameter(
    module: nn.Module,
    name: str,
    initializer: nn.initializers.Initializer,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
) -> Array:
    """Returns a float32 parameter of `module`, or the gathered copy that was passed with it.

    The parameter is created boxed with the logical names of its axes.
    """
    # Declared even if the copy is used, so that its gradient has a place.
    boxed = nn.with_logical_partitioning(initializer, axes)
    stored = cast(Array, module.param(name, boxed, shape, jnp.float32))  # Linen returns it unboxed
    if not module.has_variable(GATHERED, name):
        return stored
    # The values of the copy, and the gradient for the parameter.
    return use_copy(stored, cast(Array, module.get_variable(GATHERED, name)), axes)


class RMSNorm(nn.Module):
    """Computes `x * rsqrt(mean(x^2) + eps)` in float32, casts back and multiplies by a weight (not by 1 + weight).

    Attributes:
      eps: the epsilon.
      initial: the initial weight.
    """

    eps: float
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Normalizes along the last axis."""
        scale = parameter(self, "scale", nn.initializers.constant(self.initial), ("norm",), (x.shape[-1],))
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * scale.astype(x.dtype)[None, None]


def matrix_initializer(config: ModelConfig, factor: float = 1.0) -> nn.initializers.Initializer:
    """Returns the initializer of the matrices of a model, with its standard deviation multiplied by `factor`."""
    std = factor * config.init_std
    match config.initializer:
        case Initializer.NORMAL:
            return nn.initializers.normal(std)
        case Initializer.SCALED_BY_DEPTH:
            return nn.initializers.truncated_normal(std, lower=-3.0, upper=3.0)


class Projection(nn.Module):
    """A linear map from the trailing axes of its input to `features`, in the dtype of the input.

    Attributes:
      features: the trailing axes of the output.
      axes: the logical names of the axes of the kernel.
      initializer: the initializer of the kernel.
      contracted: the number of trailing axes of the input that are contracted.
      use_bias: whether a bias is added, which starts at zero.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: nn.initializers.Initializer
    contracted: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B S ..."]) -> Float[Array, "B S ..."]:
        """Contracts the trailing axes of `x` with the kernel."""
        shape = (*x.shape[-self.contracted :], *self.features)
        kernel = parameter(self, "kernel", self.initializer, self.axes, shape)
        product = _cpu_product if target_platform() == "cpu" else _product
        out = product(x, kernel.astype(x.dtype), self.contracted)
        if not self.use_bias:
            return out

        bias = parameter(self, "bias", nn.initializers.zeros, self.axes[self.contracted :], self.features)
        return out + bias.astype(x.dtype)[None, None]


def _product(x: Array, kernel: Array, contracted: int) -> Array:
    """Returns the product over the last `contracted` axes of `x` and the first of `kernel`."""
    return jnp.tensordot(x, kernel, axes=contracted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cpu_product(x: Array, kernel: Array, contracted: int) -> Array:
    """Returns the same as `_product`, with a gradient that XLA's CPU compiler computes faster.

    JAX computes the gradient of the kernel as the transpose of cotangents times inputs. For that, the compiler
    transposes the cotangents of every projection, including the widest arrays of a layer, and does not use its fast
    library of matrix products.
    """
    return _product(x, kernel, contracted)


def _cpu_product_forward(x: Array, kernel: Array, contracted: int) -> tuple[Array, tuple[Array, Array]]:
    return _product(x, kernel, contracted), (x, kernel)


def _cpu_product_backward(contracted: int, saved: tuple[Array, Array], cotangents: Array) -> tuple[Array, Array]:
    x, kernel = saved
    tokens = tuple(range(x.ndim - contracted))
    features = kernel.ndim - contracted
    trailing = tuple(range(cotangents.ndim - features, cotangents.ndim)), tuple(range(contracted, kernel.ndim))

    # Contracts the features of cotangents and kernel.
    x_grad = jax.lax.dot_general(cotangents, kernel, (trailing, ((), ())))
    # Contracts all axes of tokens.
    kernel_grad = jax.lax.dot_general(x, cotangents, ((tokens, tokens), ((), ())))
    return x_grad, kernel_grad


_cpu_product.defvjp(_cpu_product_forward, _cpu_product_backward)
