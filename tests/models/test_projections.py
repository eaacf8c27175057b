"""Projections: their handwritten gradient on a CPU equals the one that JAX derives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looplm_jax.models._blocks import Projection


@pytest.mark.parametrize(
    ("inputs", "features", "contracted"),
    [((2, 5, 8), (12,), 1), ((2, 5, 8), (3, 4), 1), ((2, 5, 3, 4), (8,), 2)],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_a_tensor_product(inputs, features, contracted, dtype):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=inputs), dtype)
    kernel, target = (
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in ((*inputs[-contracted:], *features), (2, 5, *features))
    )
    projection = Projection(features, ("a",) * kernel.ndim, jax.nn.initializers.normal(1.0), contracted=contracted)

    def ours(x, kernel):
        return jnp.sum(jnp.sin(projection.apply({"params": {"kernel": kernel}}, x).astype(jnp.float32)) * target)

    def derived(x, kernel):
        return jnp.sum(jnp.sin(jnp.tensordot(x, kernel.astype(dtype), contracted).astype(jnp.float32)) * target)

    got, wanted = (jax.jit(jax.value_and_grad(way, argnums=(0, 1)))(x, kernel) for way in (ours, derived))
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for mine, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert mine.dtype == other.dtype
        mine, other = (np.asarray(leaf, np.float32) for leaf in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)
