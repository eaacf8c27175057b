"""Our JAX model and our PyTorch model agree in every state, gate, logit, key and value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from twins import CASES, twins

from looplm_jax.config import Dtype
from looplm_jax.halting import exit_distribution, q_exit
from looplm_jax.models._looplm import head_matrix

pytestmark = pytest.mark.transformers
THRESHOLDS = (0.0, 0.3, 0.5, 0.9, 1.0)


@functools.cache
def both(case, dtype=Dtype.FLOAT32):
    """Returns output and cache for the same tokens, from JAX and from PyTorch."""
    pair = twins(case, dtype)
    ids = pair.tokens(2, 11)
    forward = jax.jit(lambda params, ids: pair.model.apply({"params": params}, ids, method="prefill"))
    with torch.no_grad():
        theirs = pair.torch_model(torch.tensor(ids), output_hidden_states=True, use_cache=True)
    return forward(pair.params, jnp.asarray(ids, jnp.int32)), theirs


def logits_of_every_loop(case):
    (output, _), _ = both(case)
    pair = twins(case)
    return np.asarray(output.hidden @ head_matrix(pair.params, pair.config))


@pytest.mark.parametrize("case", CASES)
def test_states_and_gates_of_every_loop(case):
    (ours, _), theirs = both(case)
    assert len(theirs.hidden_states) == twins(case).config.loops
    np.testing.assert_allclose(ours.hidden, torch.stack(theirs.hidden_states).numpy(), rtol=0, atol=1e-4)
    gates = np.moveaxis(theirs.gate_logits.numpy(), -1, 0)
    np.testing.assert_allclose(ours.gate_logits, gates, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_exit_distribution(case):
    (ours, _), theirs = both(case)
    pdf = np.moveaxis(theirs.exit_probabilities.numpy(), -1, 0)
    np.testing.assert_allclose(exit_distribution(ours.gate_logits), pdf, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_logits_at_every_loop(case):
    ours, pair = logits_of_every_loop(case), twins(case)
    for loop in range(1, pair.config.loops + 1):
        with torch.no_grad():
            theirs = pair.torch_model(torch.tensor(pair.tokens(2, 11)), exit_loop=loop).logits
        np.testing.assert_allclose(ours[loop - 1], theirs.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_at_the_exit_of_every_threshold(case, threshold):
    (output, _), _ = both(case)
    pair = twins(case)
    exits = q_exit(exit_distribution(output.gate_logits), threshold)
    ours = np.take_along_axis(logits_of_every_loop(case), np.asarray(exits - 1)[None, ..., None], axis=0)[0]
    with torch.no_grad():
        theirs = pair.torch_model(torch.tensor(pair.tokens(2, 11)), exit_threshold=threshold)
    np.testing.assert_array_equal(exits, theirs.exit_loops.numpy())
    np.testing.assert_allclose(ours, theirs.logits.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_weighted_exit_is_the_expected_logits(case):
    (output, _), _ = both(case)
    pair = twins(case)
    ours = jnp.einsum("tbs,tbsv->bsv", exit_distribution(output.gate_logits), logits_of_every_loop(case))
    with torch.no_grad():
        theirs = pair.torch_model(torch.tensor(pair.tokens(2, 11)), exit_weighted=True).logits
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_keys_and_values_of_every_loop_and_layer(case):
    (_, cache), theirs = both(case)
    for name in ("keys", "values"):
        ours = np.asarray(getattr(cache.core, name))
        ours = np.swapaxes(ours.reshape(-1, *ours.shape[2:]), 2, 3)  # [T * L, B, K, S, Dh]
        planes = torch.stack([getattr(layer, name) for layer in theirs.past_key_values.layers])
        np.testing.assert_allclose(ours, planes.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "case", [case if case.endswith(("T1", "T8_tied")) else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_bfloat16_differs_by_less_than_two_percent_a_loop(case):
    """Both round products to 8 bits, in different order, and loops amplify it: root mean square over all states."""
    (ours, _), theirs = both(case, Dtype.BFLOAT16)
    mine = np.asarray(ours.hidden, np.float32)
    other = torch.stack(theirs.hidden_states).float().numpy()
    relative = np.sqrt(np.mean((mine - other) ** 2) / np.mean(other**2))
    assert 0 < relative < 0.02 * twins(case).config.loops
