"""The Stage II loss equals a direct transcription of Eq. 5 and 6, and trains only the gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import GateTarget
from looplm_jax.losses import stage2

both_targets = pytest.mark.parametrize("target", list(GateTarget))


def random_inputs(loops=4, seed=0):
    random = np.random.default_rng(seed)
    losses = np.cumsum(random.normal(0.0, 0.02, (loops, 2, 5)), axis=0) + 3
    gates, mask = random.normal(0, 3, losses.shape), random.random((2, 5)) < 0.7
    return tuple(jnp.asarray(x, jnp.float32) for x in (losses, gates, mask))


def transcription(losses, gates, mask, k, gamma, target):
    """Computes Eq. 5 and 6 token by token in float64; t counts from 1, as in the paper."""
    loops, rows, columns = losses.shape
    tokens = [(b, s) for b in range(rows) for s in range(columns) if mask[b, s]]
    adaptive, targets = [], []
    for t in range(2, loops + 1):
        gate = t if target is GateTarget.AS_PRINTED else t - 1
        terms, goes_on = [], []
        for b, s in tokens:
            gain = max(0.0, float(losses[t - 2, b, s]) - float(losses[t - 1, b, s]))
            w = 1 / (1 + np.exp(-k * (gain - gamma)))
            lam = 1 / (1 + np.exp(-np.float64(gates[gate - 1, b, s])))
            terms.append(w * np.log(1 - lam) + (1 - w) * np.log(lam))
            goes_on.append(w)
        adaptive.append(-np.mean(terms))
        targets.append(np.mean(goes_on))
    return sum(adaptive) / loops, adaptive, targets


@both_targets
@given(
    loops=st.sampled_from([2, 4]),
    seed=st.integers(0, 999),
    k=st.floats(1, 100),
    gamma=st.floats(0, 0.05),
)
def test_equals_a_transcription_of_the_equations(target, loops, seed, k, gamma):
    losses, gates, mask = random_inputs(loops, seed)
    ours, metrics = stage2(losses, gates, k=k, gamma=gamma, mask=mask, target=target)
    total, adaptive, targets = transcription(*(np.asarray(x) for x in (losses, gates, mask)), k, gamma, target)
    np.testing.assert_allclose(ours, total, rtol=1e-4)
    np.testing.assert_allclose(metrics.adaptive_loss, adaptive, rtol=1e-4)
    np.testing.assert_allclose(metrics.continue_target, targets, rtol=1e-4)


def test_defaults_are_those_of_the_paper():
    losses, gates, mask = random_inputs()
    spelled_out = stage2(losses, gates, k=50.0, gamma=0.005, mask=mask, target=GateTarget.AS_PRINTED)
    assert stage2(losses, gates, mask=mask)[0] == spelled_out[0]


@both_targets
def test_gradient_reaches_the_gates_only(target):
    losses, gates, mask = random_inputs()

    def loss(losses, gates):
        return stage2(losses, gates, mask=mask, target=target)[0]

    of_losses, of_gates = jax.grad(loss, argnums=(0, 1))(losses, gates)
    np.testing.assert_array_equal(of_losses, 0)
    unused = 0 if target is GateTarget.AS_PRINTED else -1
    np.testing.assert_array_equal(of_gates[unused], 0)
    used = np.delete(np.asarray(of_gates), unused, axis=0)
    assert (used[:, np.asarray(mask, bool)] != 0).all()
    np.testing.assert_array_equal(used[:, ~np.asarray(mask, bool)], 0)


@both_targets
def test_no_gradient_reaches_hidden_states_through_the_losses(target):
    _, gates, mask = random_inputs()
    hidden = jnp.ones((4, 2, 5, 3))
    gradient = jax.grad(lambda h: stage2(jnp.sum(h**2, axis=-1), gates, mask=mask, target=target)[0])(hidden)
    np.testing.assert_array_equal(gradient, 0)


@both_targets
def test_the_best_gate_is_one_minus_the_target(target):
    losses, _, mask = random_inputs()
    go_on = jax.nn.sigmoid(50.0 * (jnp.maximum(0.0, losses[:-1] - losses[1:]) - 0.005))
    best = -jnp.log(go_on) + jnp.log1p(-go_on)  # the logit of lambda = 1 - w
    rest = jnp.zeros_like(losses[:1])
    gates = jnp.concatenate([rest, best] if target is GateTarget.AS_PRINTED else [best, rest])
    gradient = jax.grad(lambda g: stage2(losses, g, mask=mask, target=target)[0])(gates)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@both_targets
@pytest.mark.parametrize("logit", [-80.0, 80.0, -1e4, 1e4])
def test_saturated_gates_keep_loss_and_gradients_finite(logit, target):
    losses, gates, mask = random_inputs()
    value, gradient = jax.value_and_grad(lambda g: stage2(losses, g, mask=mask, target=target)[0])(
        jnp.full_like(gates, logit)
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@both_targets
def test_masked_tokens_have_no_influence(target):
    losses, gates, mask = random_inputs(seed=0)
    other_losses, other_gates, _ = random_inputs(seed=1)
    ours = stage2(losses, gates, mask=mask, target=target)
    theirs = stage2(
        jnp.where(mask > 0, losses, other_losses), jnp.where(mask > 0, gates, other_gates), mask=mask, target=target
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@both_targets
def test_a_batch_with_every_token_masked_gives_zero(target):
    losses, gates, mask = random_inputs()
    value, gradient = jax.value_and_grad(lambda g: stage2(losses, g, mask=mask * 0, target=target)[0])(gates)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
