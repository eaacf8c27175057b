"""The size of the Jacobian `J = df/dz` of a loop: a penalty that keeps loops stable, and their spectral radius.

    frobenius:  E_v |v^T J|^2 / n,  v ~ N(0, I) with n entries             = |J|_F^2 / n         (2106.14342)
    spectral:   |v_k^T J|^2,  v_{t+1} = v_t^T J / |v_t^T J|,  |v_1| = 1    after k products      (STARS)

With one product the spectral penalty is an estimate of the Frobenius one. With many, it is the squared spectral radius
of the row with the largest if all rows count as one vector, or their mean if each row is one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from looplm_jax.config import JacobianNorm


def jacobian_penalty(
    f: Callable[[Array], Array],
    z: Float[Array, "*S"],
    v: Float[Array, "*S"],
    *,
    norm: JacobianNorm = JacobianNorm.FROBENIUS,
    iterations: int = 1,
    per_row: bool = False,
) -> Float[Array, ""]:
    """Computes the penalty from products of a random direction with the Jacobian, in float32 or wider.

    Args:
      f: the function of the state. Its parameters receive gradients.
      z: the state at which J is taken, which is held constant.
      v: the direction, drawn from a standard normal distribution.
      norm: the norm of J. The Frobenius penalty is unbiased and takes one product.
      iterations: the number of products of the spectral penalty. The gradient passes through all of them.
      per_row: whether each row along the leading axis is a vector of its own, whose penalties are averaged. The
        Frobenius penalty is such a mean anyway.

    Returns:
      The penalty, a scalar over all rows.
    """
    wide = np.promote_types(z.dtype, np.float32)
    _, pull = jax.vjp(f, jax.lax.stop_gradient(z))

    def product(direction: Array) -> Array:
        return pull(direction.astype(z.dtype))[0].astype(wide)

    if norm is JacobianNorm.FROBENIUS:
        return jnp.sum(jnp.square(product(v))) / z.size

    axes = tuple(range(1, z.ndim)) if per_row else None

    def step(direction: Array, _: None) -> tuple[Array, None]:
        return _unit(product(direction), axes), None

    direction, _ = jax.lax.scan(step, _unit(v.astype(wide), axes), None, length=iterations - 1)
    return jnp.sum(jnp.square(product(direction))) / (z.shape[0] if per_row else 1)


def spectral_radius(
    f: Callable[[Array], Array],
    z: Float[Array, "B *S"],
    v: Float[Array, "B *S"],
    *,
    iterations: int = 40,
    averaged: int = 20,
) -> Float[Array, "B"]:
    """Returns the spectral radius of the Jacobian of each row, by the power method.

    It is the geometric mean of the growth of a direction in the last products, which also converges for complex
    eigenvalues. For a causal `f`, J is block triangular over positions: the radius is that of the blocks of single
    positions, and does not show growth along the sequence.

    Args:
      f: the function of the state, whose rows do not depend on each other.
      z: the state at which J is taken.
      v: the direction to start from, drawn from a standard normal distribution.
      iterations: the number of products with the transpose of J.
      averaged: the number of last products whose growth is averaged.
    """
    wide = np.promote_types(z.dtype, np.float32)
    axes = tuple(range(1, z.ndim))
    # Products with the transposed Jacobian, which has the same eigenvalues: they also exist where `f` has a gradient of
    # its own (`custom_vjp`), as matrix products have on CPU.
    _, pull = jax.vjp(f, z)

    def step(direction: Array, _: None) -> tuple[Array, Array]:
        product = pull(direction.astype(z.dtype))[0].astype(wide)
        return _unit(product, axes), jnp.sqrt(jnp.sum(jnp.square(product), axis=axes))

    _, growth = jax.lax.scan(step, _unit(v.astype(wide), axes), None, length=iterations)
    return jnp.exp(jnp.mean(jnp.log(growth[-averaged:]), axis=0))


def _unit(direction: Array, axes: tuple[int, ...] | None = None) -> Array:
    """Returns the direction with unit norm over the axes, or zero if it is zero."""
    square = jnp.sum(jnp.square(direction), axis=axes, keepdims=True)
    return direction / jnp.sqrt(jnp.maximum(square, jnp.finfo(direction.dtype).tiny))
