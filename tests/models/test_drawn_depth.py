"""Each sequence with its own number of loops: the same values and gradients as loops written out, in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looplm_jax.config import ComputeConfig, Injection, Remat, TimeSignal
from looplm_jax.models import init_params
from looplm_jax.models._drawn_depth import last_loop
from looplm_jax.models._looplm import LoopLM
from looplm_jax.testing import tiny_config

MOST, LENGTH = 4, 5
PLAIN = {"num_layers": 1}
WITH_INJECTION = {
    "num_layers": 1,
    "injection": Injection.LINEAR,
    "prelude_layers": 1,
    "coda_layers": 1,
    "time_signal": TimeSignal.SINUSOID,  # each sequence counts its own loops
}


def setup(changes, remat=Remat.NONE):
    model = LoopLM(tiny_config(**changes), ComputeConfig(remat=remat))
    params = init_params(model, jax.random.key(0))
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(0, model.config.vocab_size, (3, LENGTH)), jnp.int32)
    weights = jnp.asarray(generator.normal(size=(3, LENGTH, model.config.width)), jnp.float32)
    return model, params, tokens, weights


def program(model, tokens, weights, backprop_loops, traces):
    """Returns a compiled function of parameters and depths: a sum over the last hidden states, and its gradient."""

    def loss(params, depths):
        traces.append(1)
        output = last_loop(model, {"params": params}, tokens, depths, most=MOST, backprop_loops=backprop_loops)
        return jnp.sum(output.hidden * weights) + jnp.sum(output.gate_logits)

    return jax.jit(jax.value_and_grad(loss))


def written_out(model, tokens, weights, depths, backprop_loops):
    """Returns the same function for given depths: one sequence and one loop after another."""

    def of_sequence(params, row):
        variables, steps = {"params": params}, depths[row]
        context, embedded, _ = model.apply(variables, tokens[row : row + 1], method="begin")
        state = model.apply(variables, embedded, method="initial_state")
        for loop in range(1, steps + 1):
            inputs = (variables, state, embedded)
            if loop <= steps - (backprop_loops or MOST):
                inputs = jax.lax.stop_gradient(inputs)
            output, _, _ = model.apply(*inputs, context, loop - 1, method="loop_step")
            state = output.state
        return jnp.sum(output.hidden[0] * weights[row]) + jnp.sum(output.gate_logits)

    return jax.jit(jax.value_and_grad(lambda params: sum(of_sequence(params, row) for row in range(len(depths)))))


def assert_same(actual, wanted):
    np.testing.assert_allclose(actual[0], wanted[0], rtol=2e-5)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(actual[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("changes", "remat"), [(PLAIN, Remat.NONE), pytest.param(WITH_INJECTION, Remat.LOOP, marks=pytest.mark.slow)]
)
def test_truncated_gradients_are_those_of_loops_written_out(changes, remat):
    model, params, tokens, weights = setup(changes, remat)
    depths = (1, 3)  # with two loops of gradients: the first starts after the truncated part
    tokens, weights = tokens[:2], weights[:2]
    ours = program(model, tokens, weights, 2, [])
    assert_same(ours(params, jnp.asarray(depths)), written_out(model, tokens, weights, depths, 2)(params))


def test_one_program_serves_all_depths_and_agrees_with_the_model_at_each():
    model, params, tokens, weights = setup(WITH_INJECTION)
    traces = []
    ours = program(model, tokens, weights, 0, traces)

    def plain(params, depths):
        output = model.apply({"params": params}, tokens, loops=MOST)
        rows = jnp.arange(3)
        hidden, gates = output.hidden[depths - 1, rows], output.gate_logits[depths - 1, rows]
        return jnp.sum(hidden * weights) + jnp.sum(gates)

    reference = jax.jit(jax.value_and_grad(plain))
    for depths in ((1, 1, 1), (2, 2, 2), (4, 4, 4), (2, 4, 1), (3, 1, 2)):
        assert_same(ours(params, jnp.asarray(depths)), reference(params, jnp.asarray(depths)))
    assert len(traces) == 1


@pytest.mark.slow
def test_the_backward_pass_keeps_only_the_last_loops():
    """Compiled temporaries do not grow with the largest depth if gradients are truncated."""
    model, params, tokens, weights = setup(PLAIN)

    def temporaries(most, backprop_loops):
        def loss(params, depths):
            output = last_loop(model, {"params": params}, tokens, depths, most=most, backprop_loops=backprop_loops)
            return jnp.sum(output.hidden * weights)

        compiled = jax.jit(jax.grad(loss)).lower(params, jnp.full(3, most)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    truncated = temporaries(64, 2)
    assert truncated < 1.05 * temporaries(4, 2)
    assert temporaries(64, 0) > 4 * truncated


@pytest.mark.slow
def test_damped_gradients_are_those_of_loops_written_out():
    model, params, tokens, weights = setup(WITH_INJECTION)

    def ours(params):
        depths = jnp.full(3, MOST)
        output = last_loop(model, {"params": params}, tokens, depths, most=MOST, backprop_loops=2, damping=0.25)
        return jnp.sum(output.hidden * weights)

    def reference(params):
        variables = {"params": params}
        context, embedded, _ = model.apply(variables, tokens, method="begin")
        state = model.apply(variables, embedded, method="initial_state")
        for loop in range(MOST):
            output, _, _ = model.apply(variables, state, embedded, context, loop, method="loop_step")
            state = output.state if loop < 2 else 0.25 * output.state + 0.75 * state
            if loop < 2:
                state = jax.lax.stop_gradient(state)
        hidden, _ = model.apply(variables, state, context, method="read_out")
        return jnp.sum(hidden * weights)

    assert_same(jax.jit(jax.value_and_grad(ours))(params), jax.jit(jax.value_and_grad(reference))(params))
