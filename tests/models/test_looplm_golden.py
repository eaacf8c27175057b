"""Equal to the official PyTorch code, to 1e-4 in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ouro_golden import golden_arrays, golden_config, golden_params

from looplm_jax.halting import exit_distribution, q_exit
from looplm_jax.models._looplm import LoopLM, head_matrix, init_params


@pytest.fixture(scope="module")
def run():
    """Returns output and cache for the golden tokens."""
    forward = jax.jit(lambda params, ids: LoopLM(golden_config()).apply({"params": params}, ids, method="prefill"))
    return forward(golden_params(), jnp.asarray(golden_arrays()["ids"], jnp.int32))


@pytest.fixture(scope="module")
def logits(run):
    return run[0].hidden @ head_matrix(golden_params(), golden_config())


def assert_golden(ours, name):
    np.testing.assert_allclose(ours, golden_arrays()[name], rtol=0, atol=1e-4)


def test_golden_tree_is_the_tree_of_our_own_parameters():
    ours = jax.eval_shape(lambda: init_params(LoopLM(golden_config()), jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, ours) == jax.tree.map(lambda x: x.shape, golden_params())


def test_hidden_states_of_every_loop(run):
    assert_golden(run[0].hidden, "hidden_steps")


def test_gate_logits_of_every_loop(run):
    assert_golden(jnp.moveaxis(run[0].gate_logits, 0, -1), "gate_logits")


def test_logits_of_every_loop(logits):
    for loop in range(4):
        assert_golden(logits[loop], f"logits_step{loop}")


def test_exit_distribution(run):
    assert_golden(jnp.moveaxis(exit_distribution(run[0].gate_logits), 0, -1), "exit_pdf")


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_logits_at_the_exit_of_each_threshold(run, logits, threshold):
    exits = q_exit(exit_distribution(run[0].gate_logits), threshold)
    chosen = jnp.take_along_axis(logits, (exits - 1)[None, ..., None], axis=0)[0]
    assert_golden(chosen, f"logits_thr{threshold}")


def test_keys_and_values_of_every_loop_and_layer(run):
    for name, ours in (("cache_k", run[1].core.keys), ("cache_v", run[1].core.values)):
        planes = ours.reshape(-1, *ours.shape[2:])  # [T, L, ...] -> [T * L, ...]
        assert_golden(jnp.swapaxes(planes, 2, 3), name)


def test_left_padded_row():
    real = jnp.asarray(golden_arrays()["attn_mask"], jnp.int32)
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    ids = jnp.asarray(golden_arrays()["ids"], jnp.int32)
    model = LoopLM(golden_config())
    output = jax.jit(lambda params: model.apply({"params": params}, ids, positions=positions, segment_ids=real))(
        golden_params()
    )
    ours = output.hidden[-1] @ golden_params()["head"]
    chosen = np.asarray(real, bool)
    np.testing.assert_allclose(ours[chosen], golden_arrays()["logits_padded"][chosen], rtol=0, atol=1e-4)
    assert np.isfinite(ours).all()
