"""Adaptive Computation Time in the model: the same mix and gradients as loops and halting written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looplm_jax.config import (
    ComputeConfig,
    GatePlacement,
    NormPlacement,
    PositionSignal,
    Remat,
    StateNorm,
    TimeSignal,
)
from looplm_jax.models import init_params, mixed_loops
from looplm_jax.models._looplm import LoopLM
from looplm_jax.testing import tiny_config, tiny_model

EPSILON, LOOPS = 0.2, 4
UNIVERSAL_TRANSFORMER = {
    "num_layers": 1,
    "norm_placement": NormPlacement.POST,
    "state_norm": StateNorm.READOUT,
    "time_signal": TimeSignal.SINUSOID,
    "position_signal": PositionSignal.SINUSOID,
    "gate": GatePlacement.BEFORE,
}
AFTER_WITH_CODA = {"num_layers": 1, "coda_layers": 1}


def written_out(model, params, tokens, updates):
    """Returns hidden states, remainders and halting probabilities, one loop after another, for given numbers N."""
    variables = {"params": params}
    context, embedded, _ = model.apply(variables, tokens, method="begin")
    state = model.apply(variables, embedded, method="initial_state")
    remainder, mix, probabilities = jnp.ones(tokens.shape), 0.0, []

    for loop in range(1, LOOPS + 1):
        output, _, _ = model.apply(variables, state, embedded, context, loop - 1, method="loop_step")
        probabilities.append(jax.nn.sigmoid(output.gate_logits))
        state = jnp.where((loop <= updates)[..., None], output.state, state)

        weight = jnp.where(loop < updates, probabilities[-1], jnp.where(loop == updates, remainder, 0.0))
        remainder = jnp.where(loop < updates, remainder - probabilities[-1], remainder)
        mix = mix + weight[..., None] * state

    hidden, _ = model.apply(variables, mix, context, method="read_out")
    return hidden, remainder, jnp.stack(probabilities)


@pytest.mark.parametrize(
    ("changes", "remat", "bias"),
    [
        (UNIVERSAL_TRANSFORMER, Remat.LOOP, -2.0),
        pytest.param(AFTER_WITH_CODA, Remat.NONE, -0.7, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_loops_written_out(changes, remat, bias):
    model, params = tiny_model(tiny_config(**changes), compute=ComputeConfig(remat=remat))
    params["gate"]["bias"] += bias  # so that tokens halt at several loops
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, model.config.vocab_size, (3, 6)), jnp.int32)
    cotangent = jnp.asarray(random.normal(size=(3, 6, model.config.width)), jnp.float32)

    def scalar(hidden, remainders):
        return jnp.sum(hidden * cotangent) + jnp.sum(remainders * cotangent[..., 0])

    def ours(params):
        output = mixed_loops(model, {"params": params}, tokens, loops=LOOPS, epsilon=EPSILON)
        return scalar(output.hidden, output.remainders), output

    def reference(params, updates):
        hidden, remainders, probabilities = written_out(model, params, tokens, updates)
        return scalar(hidden, remainders), (hidden, probabilities)

    (value, output), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    (wanted, (hidden, probabilities)), wanted_gradients = jax.jit(jax.value_and_grad(reference, has_aux=True))(
        params, output.updates
    )

    halts = np.cumsum(np.asarray(probabilities), axis=0) > 1 - EPSILON
    halts[-1] = True
    assert len(np.unique(output.updates)) == 3
    np.testing.assert_array_equal(output.updates, 1 + np.argmax(halts, axis=0))
    np.testing.assert_allclose(np.sum(output.weights, axis=0), 1, atol=1e-6)

    np.testing.assert_allclose(output.hidden, hidden, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(value, wanted, rtol=1e-4)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        scale = np.abs(np.asarray(other)).max()
        np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))


def test_the_gate_starts_with_its_bias():
    bias = init_params(LoopLM(tiny_config(gate_bias=-3.0)), jax.random.key(0))["gate"]["bias"]
    np.testing.assert_array_equal(bias, [-3])
