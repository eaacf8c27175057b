"""Projections: what they compute on a CPU, whose gradient is written out, is what JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looplm_jax.models.blocks import Projection


@pytest.mark.parametrize(
    ("inputs", "features", "contracted"),
    [((2, 5, 8), (12,), 1), ((2, 5, 8), (3, 4), 1), ((2, 5, 3, 4), (8,), 2)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_a_tensor_product(inputs, features, contracted, dtype):
    x_key, kernel_key, target_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, inputs, dtype)
    kernel = jax.random.normal(kernel_key, (*inputs[-contracted:], *features))
    target = jax.random.normal(target_key, (2, 5, *features))
    projection = Projection(features, ("a",) * kernel.ndim, init_std=1.0, contracted=contracted)

    def ours(x, kernel):
        return jnp.sum(jnp.sin(projection.apply({"params": {"kernel": kernel}}, x).astype(jnp.float32)) * target)

    def derived(x, kernel):
        return jnp.sum(jnp.sin(jnp.tensordot(x, kernel.astype(dtype), contracted).astype(jnp.float32)) * target)

    got, wanted = (jax.value_and_grad(function, argnums=(0, 1))(x, kernel) for function in (ours, derived))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(mine.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance)
