"""The penalty on the Jacobian of a loop and its spectral radius: golden values and gradients, and laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deq_golden import golden_arrays
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import JacobianNorm
from looplm_jax.losses import jacobian_penalty, spectral_radius

seeds = st.integers(0, 2**31 - 1)
radius = jax.jit(
    lambda matrix, v: spectral_radius(lambda z: z @ matrix.T, jnp.zeros_like(v), v, iterations=200, averaged=20)
)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def loop(weights):
    golden = {name: jnp.asarray(golden_arrays()[name]) for name in ("mix", "e")}
    return lambda z: jnp.tanh(
        (golden["mix"] @ z) @ weights["W"] + golden["e"] @ weights["U"] + weights["b"][None, None]
    )


def golden_weights():
    return {name: jnp.asarray(golden_arrays()[name]) for name in ("W", "U", "b")}


def penalty_and_gradients(v, **options):
    state, direction = jnp.asarray(golden_arrays()["z_star"]), jnp.asarray(golden_arrays()[v])
    value = jax.value_and_grad(lambda weights: jacobian_penalty(loop(weights), state, direction, **options))
    return jax.jit(value)(golden_weights())


@pytest.mark.usefixtures("wide")
def test_golden_frobenius_penalty():
    value, gradients = penalty_and_gradients("hutchinson/v")
    np.testing.assert_allclose(value, golden_arrays()["hutchinson/value"], rtol=0, atol=1e-10)
    for name, ours in gradients.items():
        np.testing.assert_allclose(ours, golden_arrays()[f"hutchinson/grad_{name}"], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("iterations", [1, 2, 4, 30])
def test_golden_spectral_penalty(iterations):
    value, gradients = penalty_and_gradients("stars/v0", norm=JacobianNorm.SPECTRAL, iterations=iterations)
    expected = f"stars/iters{iterations}"
    np.testing.assert_allclose(value, golden_arrays()[f"{expected}/value"], rtol=0, atol=1e-10)
    for name, ours in gradients.items():
        np.testing.assert_allclose(ours, golden_arrays()[f"{expected}/grad_{name}"], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("wide")
def test_the_mean_over_directions_is_the_frobenius_norm_per_entry():
    state, f = jnp.asarray(golden_arrays()["z_star"]), loop(golden_weights())
    directions = jax.random.normal(jax.random.key(0), (4000, *state.shape), state.dtype)
    mean = jnp.mean(jax.jit(jax.vmap(lambda v: jacobian_penalty(f, state, v)))(directions))
    np.testing.assert_allclose(mean, golden_arrays()["hutchinson/exact"], rtol=0.03)
    np.testing.assert_allclose(np.mean(golden_arrays()["frobenius2_over_n"]), golden_arrays()["hutchinson/exact"])


@pytest.mark.usefixtures("wide")
def test_golden_spectral_radius_of_every_row():
    state, f = jnp.asarray(golden_arrays()["z_star"]), loop(golden_weights())
    start = jax.random.normal(jax.random.key(0), state.shape, state.dtype)
    ours = jax.jit(lambda v: spectral_radius(f, state, v, iterations=400, averaged=100))(start)
    np.testing.assert_allclose(ours, golden_arrays()["spectral_radius"], rtol=1e-6)


@given(seeds, st.floats(0.1, 3.0), st.sampled_from([-1.0, 1.0]))
def test_radius_of_a_linear_map_is_its_largest_eigenvalue(seed, largest, sign):
    random = np.random.default_rng(seed)
    values = np.concatenate([[sign * largest], largest * random.uniform(-0.8, 0.8, 5)])
    basis = np.eye(6) + 0.1 * random.normal(size=(6, 6))
    matrix = basis @ np.diag(values) @ np.linalg.inv(basis)
    start = 1.0 + random.random((2, 6))

    with jax.enable_x64(True):
        ours = radius(jnp.asarray(matrix), jnp.asarray(start))
    np.testing.assert_allclose(ours, np.abs(np.linalg.eigvals(matrix)).max(), rtol=1e-6)


@given(seeds, st.floats(0.1, 3.0), st.floats(0.1, 3.0))
def test_radius_of_a_rotation_is_its_scale(seed, largest, angle):
    random = np.random.default_rng(seed)
    matrix = 0.5 * largest * np.eye(6)
    matrix[:2, :2] = largest * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    basis, _ = np.linalg.qr(random.normal(size=(6, 6)))
    matrix = basis @ matrix @ basis.T

    with jax.enable_x64(True):
        ours = radius(jnp.asarray(matrix), jnp.asarray(random.normal(size=(2, 6))))
    np.testing.assert_allclose(ours, np.abs(np.linalg.eigvals(matrix)).max(), rtol=1e-6)


def test_rows_have_their_own_radius():
    scales = jnp.array([0.25, 2.0])
    ours = spectral_radius(lambda z: scales[:, None] * z, jnp.ones((2, 3)), jnp.ones((2, 3)))
    np.testing.assert_allclose(ours, scales, rtol=1e-6)


def test_functions_with_a_gradient_of_their_own_have_a_radius():
    @jax.custom_vjp  # which forward-mode derivatives cannot pass; the products of the model on CPU are such functions
    def halved(z):
        return z / 2

    halved.defvjp(lambda z: (z / 2, None), lambda _, cotangent: (cotangent / 2,))
    np.testing.assert_allclose(spectral_radius(halved, jnp.ones((2, 3)), jnp.ones((2, 3))), 0.5, rtol=1e-6)


def test_a_constant_function_has_radius_and_penalty_zero():
    z = jnp.ones((2, 3))
    constant = jnp.zeros_like
    assert (spectral_radius(constant, z, z) == 0).all()
    for norm in JacobianNorm:
        assert jacobian_penalty(constant, z, z, norm=norm, iterations=3) == 0


def test_the_state_receives_no_gradient():
    gradient = jax.grad(lambda z: jacobian_penalty(jnp.sin, z, jnp.ones_like(z)))(jnp.ones((2, 3)))
    np.testing.assert_array_equal(gradient, 0)


def test_low_precision_is_summed_in_float32():
    z = jnp.ones((2, 8), jnp.bfloat16)
    for norm in JacobianNorm:
        value = jacobian_penalty(lambda z: z / 2, z, z, norm=norm, iterations=3)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, 0.25, rtol=0.02)
    assert spectral_radius(lambda z: z / 2, z, z).dtype == jnp.float32
    np.testing.assert_allclose(spectral_radius(lambda z: z / 2, z, z), 0.5, rtol=0.02)


def test_penalty_per_row_is_the_mean_of_those_of_the_rows():
    random = np.random.default_rng(0)
    matrix, z, v = (jnp.asarray(random.normal(size=(3, 3)), jnp.float32) for _ in range(3))

    @jax.jit
    def spectral(z, v):
        return jacobian_penalty(
            lambda z: jnp.tanh(z @ matrix), z, v, norm=JacobianNorm.SPECTRAL, iterations=3, per_row=True
        )

    rows = [spectral(z[row : row + 1], v[row : row + 1]) for row in range(3)]
    np.testing.assert_allclose(spectral(z, v), np.mean(rows), rtol=1e-5)
    assert np.std(rows) > 0.01
