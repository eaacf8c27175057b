"""Fixed points and their gradients: the golden values of every solver, and laws of contractions."""

import deq_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deq_golden import WEIGHTS, golden_arrays
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from looplm_jax.config import Solver, SolverKind
from looplm_jax.errors import UserError
from looplm_jax.models import fixed_point, implicit, phantom

KINDS = list(SolverKind)
EVALUATIONS = {SolverKind.LOOPS: 24, SolverKind.ANDERSON: 18, SolverKind.BROYDEN: 14}  # to 1e-10, in float64
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def loop(weights, z):
    mix = jnp.asarray(golden_arrays()["mix"], z.dtype)
    return jnp.tanh((mix @ z) @ weights["W"] + weights["e"] @ weights["U"] + weights["b"][None, None])


def golden_weights(dtype=np.float64):
    return {name: jnp.asarray(golden_arrays()[name], dtype) for name in WEIGHTS}


def precise(kind=SolverKind.LOOPS, **options):
    return Solver(**{"kind": kind, "tolerance": 1e-12, "max_loops": 100} | options)


def assert_golden(ours, name, tolerance=1e-10):
    np.testing.assert_allclose(ours, golden_arrays()[name], rtol=0, atol=tolerance, err_msg=name)


def unrolled(f, params, z, loops):
    return jax.lax.fori_loop(0, loops, lambda _, z: f(params, z), z)


def contraction(params, z):
    """A map of [B, 4], whose rows do not depend on each other, and whose Lipschitz constant is |matrix|."""
    return jnp.tanh(z @ params["matrix"] + params["bias"])


def random_contraction(seed, lipschitz, rows=3):
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(4, 4))
    matrix *= lipschitz / np.linalg.norm(matrix, 2)
    return {"matrix": jnp.asarray(matrix), "bias": jnp.asarray(random.normal(size=(rows, 4)))}


# Golden values


def test_the_file_is_what_its_script_computes():
    again = deq_golden.computed(golden_arrays())
    assert again.keys() == golden_arrays().keys()
    for name, array in again.items():
        assert_golden(array, name, 1e-11)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", KINDS)
def test_golden_fixed_point(kind):
    z, metrics = jax.jit(lambda w: fixed_point(lambda z: loop(w, z), jnp.zeros_like(w["e"]), precise(kind)))(
        golden_weights()
    )
    assert_golden(z, "z_star")
    assert (metrics.residual <= 1e-12).all()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", KINDS)
def test_evaluations_of_each_solver(kind):
    solver = precise(kind, tolerance=1e-10)
    solve = jax.jit(lambda w: fixed_point(lambda z: loop(w, z), jnp.zeros_like(w["e"]), solver))
    _, metrics = solve(golden_weights())
    assert (metrics.residual <= 1e-10).all()
    assert (metrics.evaluations <= EVALUATIONS[kind]).all()
    if kind is SolverKind.LOOPS:
        published = golden_arrays()["solver/fixed_point_iter/rel_trace"] <= 1e-10
        np.testing.assert_array_equal(metrics.evaluations, np.argmax(published, axis=1))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("loops", [1, 5, 12])
def test_golden_states_and_residuals_of_plain_loops(loops):
    weights, start = golden_weights(), jnp.asarray(golden_arrays()["states"][0])
    solver = Solver(tolerance=0.0, max_loops=loops)
    z, metrics = fixed_point(lambda z: loop(weights, z), start, solver)
    np.testing.assert_allclose(z, golden_arrays()["states"][loops], rtol=0, atol=1e-10)
    published = golden_arrays()["solver/fixed_point_iter/rel_trace"]  # begins with a placeholder
    np.testing.assert_allclose(metrics.residual, published[:, loops], rtol=1e-6)
    np.testing.assert_array_equal(metrics.evaluations, loops)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", KINDS)
def test_golden_implicit_gradient(kind):
    def objective(weights):
        z, _ = implicit(loop, weights, jnp.zeros_like(weights["e"]), precise(kind))
        return jnp.sum(jnp.asarray(golden_arrays()["cotangent"]) * z)

    value, gradients = jax.jit(jax.value_and_grad(objective))(golden_weights())
    assert_golden(value, "objective")
    for name, ours in gradients.items():
        assert_golden(ours, f"implicit/{name}")


@pytest.mark.usefixtures("wide")
def test_golden_adjoint():
    # The gradient with respect to an array that is added to the output is u itself.
    def objective(added):
        z, _ = implicit(lambda added, z: loop(weights, z) + added, added, jnp.zeros_like(added), precise())
        return jnp.sum(jnp.asarray(golden_arrays()["cotangent"]) * z)

    weights = golden_weights()
    assert_golden(jax.jit(jax.grad(objective))(jnp.zeros_like(weights["e"])), "adjoint")


@pytest.mark.usefixtures("wide")
def test_golden_jacobian():
    weights, z = golden_weights(), jnp.asarray(golden_arrays()["z_star"])
    whole = jax.jacobian(lambda z: loop(weights, z))(z).reshape(2, 30, 2, 30)
    assert_golden(np.stack([whole[0, :, 0], whole[1, :, 1]]), "jacobian")


def test_golden_implicit_gradient_in_float32():
    def objective(weights):
        z, _ = implicit(loop, weights, jnp.zeros_like(weights["e"]), Solver(tolerance=1e-6))
        return jnp.sum(jnp.asarray(golden_arrays()["cotangent"], jnp.float32) * z)

    value, gradients = jax.jit(jax.value_and_grad(objective))(golden_weights(np.float32))
    assert_golden(value, "objective", 2e-5)
    for name, ours in gradients.items():
        expected = golden_arrays()[f"implicit/{name}"]
        assert np.linalg.norm(ours - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("loops", [1, 3, 5])
def test_golden_phantom_gradient(loops, damping):
    def objective(weights):
        z = phantom(loop, weights, jnp.asarray(golden_arrays()["z_star"]), loops=loops, damping=damping)
        return jnp.sum(jnp.asarray(golden_arrays()["cotangent"]) * z)

    value, gradients = jax.jit(jax.value_and_grad(objective))(golden_weights())
    assert_golden(value, "objective")
    for name, ours in gradients.items():
        assert_golden(ours, f"phantom/k{loops}_tau{damping}/{name}")


# Laws of contractions

solve = {
    kind: jax.jit(lambda params, z, kind=kind: implicit(contraction, params, z, precise(kind, max_loops=300)))
    for kind in KINDS
}


@given(seeds, st.floats(0.0, 0.9), st.sampled_from(KINDS))
def test_the_fixed_point_satisfies_its_equation(seed, lipschitz, kind):
    with jax.enable_x64(True):
        params = random_contraction(seed, lipschitz)
        z, metrics = solve[kind](params, jnp.zeros((3, 4)))
        np.testing.assert_allclose(contraction(params, z), z, rtol=0, atol=1e-10)
        assert (metrics.residual <= 1e-12).all()


@given(seeds, st.floats(0.0, 0.9), st.sampled_from(KINDS))
def test_the_start_does_not_matter(seed, lipschitz, kind):
    with jax.enable_x64(True):
        params = random_contraction(seed, lipschitz)
        one, _ = solve[kind](params, jnp.zeros((3, 4)))
        other, _ = solve[kind](params, jnp.full((3, 4), 0.9))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)


@given(seeds, st.sampled_from(KINDS))
def test_rows_are_solved_and_stopped_by_themselves(seed, kind):
    with jax.enable_x64(True):
        params = random_contraction(seed, 0.9)
        alone, metrics = solve[kind](params, jnp.zeros((3, 4)))
        params["bias"] = params["bias"].at[1:].multiply(3.0)
        beside, others = solve[kind](params, jnp.zeros((3, 4)))
    np.testing.assert_array_equal(alone[0], beside[0])
    assert metrics.evaluations[0] == others.evaluations[0]


GRADIENTS = {
    kind: jax.jit(
        jax.grad(
            lambda params, c, kind=kind: jnp.sum(
                c * implicit(contraction, params, jnp.zeros_like(c), precise(kind, max_loops=300))[0]
            )
        )
    )
    for kind in KINDS
}
UNROLLED = jax.jit(jax.grad(lambda params, c: jnp.sum(c * unrolled(contraction, params, jnp.zeros_like(c), 200))))


@given(seeds, st.floats(0.0, 0.85), st.sampled_from(KINDS))
def test_the_implicit_gradient_is_that_of_200_unrolled_loops(seed, lipschitz, kind):
    with jax.enable_x64(True):
        params = random_contraction(seed, lipschitz)
        cotangent = jnp.asarray(np.random.default_rng(seed + 1).normal(size=(3, 4)))
        ours, expected = GRADIENTS[kind](params, cotangent), UNROLLED(params, cotangent)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@settings(max_examples=5)
@given(seeds)
def test_the_phantom_gradient_approaches_the_implicit_one(seed):
    with jax.enable_x64(True):
        params = random_contraction(seed, 0.5)
        z, _ = solve[SolverKind.LOOPS](params, jnp.zeros((3, 4)))
        exact = GRADIENTS[SolverKind.LOOPS](params, jnp.ones((3, 4)))["matrix"]
        for loops, bound in ((1, 1.0), (8, 0.5**7), (32, 1e-8)):
            ours = jax.grad(lambda p, loops=loops: jnp.sum(phantom(contraction, p, z, loops=loops)))(params)["matrix"]
            scale = np.sqrt(12) * np.linalg.norm(z) / (1 - 0.5)
            assert np.linalg.norm(ours - exact) <= bound * scale


@pytest.mark.usefixtures("wide")
def test_second_derivatives_are_those_of_unrolled_loops():
    params = random_contraction(0, 0.5)

    def reverse_twice(solution):
        gradient = jax.grad(lambda b: jnp.sum(solution({**params, "bias": b}) ** 2))
        return jax.jit(jax.grad(lambda b: jnp.sum(jnp.sin(gradient(b)))))(params["bias"])

    start = jnp.zeros((3, 4))
    ours = reverse_twice(lambda p: implicit(contraction, p, start, precise())[0])
    np.testing.assert_allclose(ours, reverse_twice(lambda p: unrolled(contraction, p, start, 100)), atol=1e-9)


# Arrays, programs and devices


def test_arrays_that_the_function_closes_over_receive_gradients():
    params = jax.tree.map(lambda x: x.astype(jnp.float32), random_contraction(0, 0.5))
    order = jnp.array([2, 0, 1])

    @jax.jit
    def closed(params, order):
        # An integer array of the surrounding program is closed over too.
        def f(_, z):
            return contraction({**params, "bias": params["bias"][order]}, z)

        return jnp.sum(implicit(f, (), jnp.zeros((3, 4)), Solver(tolerance=1e-6))[0] ** 2)

    def explicit(params):
        params = {**params, "bias": params["bias"][order]}
        return jnp.sum(implicit(contraction, params, jnp.zeros((3, 4)), Solver(tolerance=1e-6))[0] ** 2)

    ours, expected = jax.grad(closed)(params, order), jax.grad(explicit)(params)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-5)


@pytest.mark.parametrize(
    "kind", [SolverKind.BROYDEN, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2])]
)
def test_vmap_and_jit_agree_with_one_call_each(kind):
    solver = Solver(kind=kind, tolerance=1e-6)
    many = [jax.tree.map(lambda x: x.astype(jnp.float32), random_contraction(seed, 0.6)) for seed in range(3)]

    def gradient(params):
        return jax.grad(lambda p: jnp.sum(implicit(contraction, p, jnp.zeros((3, 4)), solver)[0]))(params)

    mapped = jax.jit(jax.vmap(gradient))(jax.tree.map(lambda *leaves: jnp.stack(leaves), *many))
    for index, params in enumerate(many):
        for name, ours in gradient(params).items():
            np.testing.assert_allclose(mapped[name][index], ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_for_any_number_of_iterations_and_no_transfer_to_the_host(kind):
    traces = []

    @jax.jit
    def counted(scale, z):
        traces.append(scale)
        return fixed_point(lambda z: jnp.tanh(scale * z + 1.0), z, Solver(kind=kind, tolerance=1e-5))

    arguments = [(jnp.float32(scale), jnp.zeros((2, 4))) for scale in (0.1, 0.9)]
    with jax.transfer_guard("disallow"):
        solved = [counted(*each)[1] for each in arguments]
    assert len(traces) == 1
    assert (solved[0].evaluations < solved[1].evaluations).all()


def test_memory_does_not_depend_on_the_number_of_iterations():
    def temporaries(loops):
        solver = Solver(tolerance=0.0, max_loops=loops)
        gradient = jax.grad(lambda p: jnp.sum(implicit(contraction, p, jnp.zeros((64, 4)), solver)[0]))
        params = jax.tree.map(lambda x: x.astype(jnp.float32), random_contraction(0, 0.5, rows=64))
        return jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(4) == temporaries(400)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_positions_keep_their_sharding(kind):
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    placed = NamedSharding(mesh, PartitionSpec("data", "context"))
    solver = Solver(kind=kind, tolerance=1e-6)
    inputs = jax.random.normal(jax.random.key(0), (8, 4, 3))

    @jax.jit
    def run(inputs):
        return fixed_point(lambda z: jnp.tanh(0.5 * z + inputs), jnp.zeros_like(inputs), solver)

    here, _ = run(inputs)
    there, metrics = run(jax.device_put(inputs, placed))
    np.testing.assert_allclose(there, here, atol=1e-5)
    assert (metrics.residual <= 1e-6).all()
    assert there.sharding.is_equivalent_to(placed, there.ndim)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_evaluated_as_given_and_solved_in_float32(kind):
    seen = []

    def f(params, z):
        seen.append(z.dtype)
        return jnp.tanh(params * z + 1)

    def value(params):
        z, metrics = implicit(f, params, jnp.zeros((2, 3), jnp.bfloat16), Solver(kind=kind, tolerance=1e-2))
        return jnp.sum(z), (z, metrics)

    gradient, (z, metrics) = jax.grad(value, has_aux=True)(jnp.bfloat16(0.5))
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    assert gradient.dtype == z.dtype == jnp.bfloat16
    assert metrics.residual.dtype == jnp.float32
    np.testing.assert_allclose(z.astype(jnp.float32), 0.8956, atol=0.01)  # z = tanh(z / 2 + 1)


# What has no fixed point


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_with_the_smallest_residual_is_returned(kind):
    # The iteration moves away from its fixed point at 1.
    def f(z):
        return 1.0 + 3.0 * (z - 1.0) + 0.1 * (z - 1.0) ** 2

    start = jnp.full((2, 2), 1.01)
    z, metrics = fixed_point(f, start, Solver(kind=kind, max_loops=20, tolerance=0.0))
    assert np.isfinite(z).all()
    first = jnp.linalg.norm(f(start) - start, axis=1) / jnp.linalg.norm(f(start), axis=1)
    assert (metrics.residual <= first * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_is_seen_and_disturbs_no_other(kind):
    inputs = jnp.array([[jnp.nan, 0.0], [0.5, 0.1]])
    z, metrics = fixed_point(lambda z: jnp.tanh(0.5 * z + inputs), jnp.zeros((2, 2)), Solver(kind=kind, tolerance=1e-5))
    assert np.isnan(metrics.residual[0])
    assert np.isnan(z[0, 0])
    assert metrics.residual[1] <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_zero_where_the_cotangent_is(kind):
    params = jax.tree.map(lambda x: x.astype(jnp.float32), random_contraction(0, 0.5))
    gradient = jax.grad(lambda p: 0.0 * jnp.sum(implicit(contraction, p, jnp.zeros((3, 4)), Solver(kind=kind))[0]))
    for leaf in jax.tree.leaves(gradient(params)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_at_its_fixed_point_stays(kind):
    z, metrics = fixed_point(lambda z: z, jnp.ones((2, 3)), Solver(kind=kind, tolerance=0.0))
    np.testing.assert_array_equal(z, 1)
    np.testing.assert_array_equal(metrics.evaluations, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -1.0}, "solver.tolerance must not be negative, not -1.0"),
        ({"max_loops": 0}, "solver.max_loops must be at least 1, not 0"),
        ({"memory": 0}, "solver.memory must be at least 1, not 0"),
        ({"kind": "broyden"}, "solver.kind must be of type SolverKind, not 'broyden'"),
    ],
)
def test_a_solver_without_meaning_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Solver(**options)
