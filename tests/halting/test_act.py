"""Adaptive Computation Time: the golden values and gradients, and laws for any halting probabilities."""

import act_golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from act_golden import golden_arrays
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from looplm_jax.halting import act, exit_cdf, interpolated_state, mean_exit_loop, ponder_cost, weighted_state

OUTPUTS = {"weighted_sum": weighted_state, "interpolated": interpolated_state}
FORCED = {"forced": True, "as_published": False}
shapes = st.sampled_from([(1,), (2,), (6,), (4, 3), (3, 2, 2)])  # few, because each shape is compiled
probability = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 0.99, 1.0])
probabilities = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=probability))
halted = jax.jit(act)
unforced = jax.jit(lambda p: act(p, forced=False))


@pytest.fixture
def wide():
    with jax.enable_x64(True):
        yield


def assert_golden(ours, name, tolerance=1e-10):
    np.testing.assert_allclose(ours, golden_arrays()[name], rtol=0, atol=tolerance, err_msg=name)


def test_the_file_is_what_its_script_computes():
    again = act_golden.computed(golden_arrays())
    assert again.keys() == golden_arrays().keys()
    for name, array in again.items():
        assert_golden(array, name, 1e-14)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", FORCED)
def test_golden_weights_remainders_and_updates(name):
    ours = act(jnp.asarray(golden_arrays()["p"]), epsilon=0.01, forced=FORCED[name])
    assert_golden(ours.weights, f"{name}/weights")
    assert_golden(ours.remainders, f"{name}/remainders")
    np.testing.assert_array_equal(ours.updates, golden_arrays()[f"{name}/n_updates"])
    assert ours.updates.dtype == jnp.int32
    assert_golden(ponder_cost(ours.remainders, ours.updates), f"{name}/ponder_cost")


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", FORCED)
def test_golden_gradient_of_the_ponder_cost(name):
    def cost(p):
        _, remainders, updates = act(p, forced=FORCED[name])
        return ponder_cost(remainders, updates)

    assert_golden(jax.jit(jax.grad(cost))(jnp.asarray(golden_arrays()["p"])), f"{name}/grad_p_of_ponder")


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 2e-5)])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", FORCED)
def test_golden_outputs_objectives_and_gradients(name, output, dtype, tolerance):
    golden = golden_arrays()

    with jax.enable_x64(dtype is np.float64):
        p, states, cotangent = (jnp.asarray(golden[key].astype(dtype)) for key in ("p", "states", "cotangent"))

        def objective(p, states):
            weights, remainders, updates = act(p, forced=FORCED[name])
            state = OUTPUTS[output](weights, states)
            return jnp.sum(cotangent * state) + float(golden["tau"]) * ponder_cost(remainders, updates), state

        (value, state), (of_p, of_states) = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))(
            p, states
        )

        assert_golden(state, f"{name}/{output}", tolerance)
        assert_golden(value, f"{name}/{output}/objective", tolerance)
        assert_golden(of_p, f"{name}/{output}/grad_p", tolerance)
        assert_golden(of_states, f"{name}/{output}/grad_states", tolerance)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", ["copy", "continue"])
def test_golden_states_of_tokens_that_have_halted(name):
    toy = {key: jnp.asarray(golden_arrays()[f"toy/{key}"]) for key in ("W", "U", "gate", "gate_bias", "initial", "mix")}

    def loop(state, weights_so_far):
        """Runs one loop; tokens whose weights already sum to one have halted."""
        p = jax.nn.sigmoid(state @ toy["gate"] + toy["gate_bias"])
        following = jnp.tanh(state @ toy["W"] + (toy["mix"] @ state) @ toy["U"])
        return p, jnp.where((weights_so_far > 0.99)[..., None], state, following) if name == "copy" else following

    state, p, states = toy["initial"], [], []
    for _ in range(6):
        ended = act(jnp.stack(p), forced=False).weights.sum(axis=0) if p else jnp.zeros(state.shape[:2])
        probability, state = loop(state, ended)
        p.append(probability)
        states.append(state)

    ours = act(jnp.stack(p))
    assert_golden(jnp.stack(states), f"toy/{name}/states")
    assert_golden(jnp.stack(p), f"toy/{name}/p")
    assert_golden(ours.weights, f"toy/{name}/weights")
    assert_golden(ours.remainders, f"toy/{name}/remainders")
    assert_golden(ours.updates, f"toy/{name}/n_updates")
    assert_golden(weighted_state(ours.weights, jnp.stack(states)), f"toy/{name}/output")


@given(probabilities)
def test_weights_are_an_exit_distribution(p):
    weights, remainders, updates = halted(jnp.asarray(p))
    np.testing.assert_allclose(jnp.sum(weights, axis=0), 1.0, atol=2e-6)
    assert (weights >= 0).all()
    assert (exit_cdf(weights)[-1] == 1).all()
    assert (mean_exit_loop(weights) <= np.asarray(updates) + 1e-5).all()
    assert ((updates >= 1) & (updates <= len(p))).all()
    assert ((remainders >= 0.01 - 1e-5) & (remainders <= 1)).all()


@given(probabilities)
def test_equals_the_definition_in_float64(p):
    sums = np.cumsum(p.astype(np.float64), axis=0)
    assume(np.abs(sums - 0.99).min(initial=1.0) > 1e-5)  # ties depend on rounding
    loop = np.arange(1, len(p) + 1).reshape(-1, *[1] * (p.ndim - 1))
    expected = np.where(sums > 0.99, loop, len(p)).min(axis=0)
    weights, remainders, updates = halted(jnp.asarray(p))
    np.testing.assert_array_equal(updates, expected)
    np.testing.assert_allclose(weights, np.where(loop < expected, p, np.where(loop == expected, remainders, 0)))
    np.testing.assert_allclose(remainders, 1 - np.sum(np.where(loop < expected, p, 0), axis=0), atol=1e-5)


@given(probabilities)
def test_without_the_forced_loop_only_tokens_that_run_on_differ(p):
    ours, published = halted(jnp.asarray(p)), unforced(jnp.asarray(p))
    ran_on = np.broadcast_to(published.remainders == 0, p.shape)
    np.testing.assert_array_equal(published.updates, ours.updates)
    np.testing.assert_array_equal(published.weights, np.where(ran_on, p, ours.weights))
    assert (jnp.sum(published.weights, axis=0) <= 1 + 2e-6).all()


@given(probabilities)
def test_weights_of_the_interpolation_fall_short_of_one_by_a_product(p):
    weights = halted(jnp.asarray(p)).weights
    state = interpolated_state(weights, jnp.ones((*p.shape, 2), jnp.float32))
    np.testing.assert_allclose(state[..., 0], 1 - np.prod(1 - np.asarray(weights), axis=0), atol=1e-5)


@jax.jit
@jax.grad
def gradient_of_all_costs(p):
    _, remainders, updates = act(p)
    return ponder_cost(remainders, updates) * updates.size


@given(probabilities)
def test_the_gradient_of_the_ponder_cost_is_minus_one_before_the_halting_loop(p):
    updates = np.asarray(halted(jnp.asarray(p)).updates)
    loop = np.arange(1, len(p) + 1).reshape(-1, *[1] * (p.ndim - 1))
    np.testing.assert_allclose(gradient_of_all_costs(jnp.asarray(p)), np.where(loop < updates, -1.0, 0.0), atol=1e-6)


def test_the_comparison_is_strict():
    assert act(jnp.array([0.5, 0.25, 1.0]), epsilon=0.5).updates == 2  # 0.5 does not exceed 1 - 0.5
    assert act(jnp.array([0.75, 0.25, 1.0]), epsilon=0.5).updates == 1


def test_masked_tokens_do_not_count():
    _, remainders, updates = act(jnp.array([[0.5, 1.0], [1.0, 1.0]]))
    np.testing.assert_allclose(ponder_cost(remainders, updates, mask=jnp.array([1.0, 0.0])), 2.5)
    np.testing.assert_allclose(ponder_cost(remainders, updates, mask=jnp.array([0.0, 1.0])), 2.0)
    assert ponder_cost(remainders, updates, mask=jnp.zeros(2)) == 0


def test_low_precision_is_summed_in_float32():
    p = jnp.full((8, 2), 0.2, jnp.bfloat16)
    weights, remainders, updates = act(p)
    assert weights.dtype == remainders.dtype == jnp.float32
    assert weighted_state(weights, jnp.ones((8, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert interpolated_state(weights, jnp.ones((8, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
    assert (updates == 5).all()


def test_vmap_over_tokens_and_one_program_for_any_values():
    p = jnp.asarray(golden_arrays()["p"], jnp.float32)
    traces = []

    @jax.jit
    def counted(p):
        traces.append(p)
        return act(p)

    whole, other = counted(p), counted(1 - p)
    assert len(traces) == 1
    assert not np.array_equal(whole.updates, other.updates)
    mapped = jax.vmap(act, in_axes=1, out_axes=type(whole)(weights=1, remainders=0, updates=0))(p)
    for ours, theirs in zip(mapped, whole):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
