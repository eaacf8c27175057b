"""Laws of the exit distribution (paper v4, section 3.2) for any finite gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from looplm_jax import halting
from looplm_jax.halting import QExit
from looplm_jax.halting.signals import Signals

# Jitted, so that each is one program per shape instead of many operations.
(
    entropy,
    exit_cdf,
    exit_distribution,
    log_exit_distribution,
    log_exit_probability,
    log_survival,
    mean_exit_loop,
    q_exit,
) = (
    jax.jit(function)
    for function in (
        halting.entropy,
        halting.exit_cdf,
        halting.exit_distribution,
        halting.log_exit_distribution,
        halting.log_exit_probability,
        halting.log_survival,
        halting.mean_exit_loop,
        halting.q_exit,
    )
)
EXTREMES = [0.0, -80.0, 80.0, -1e4, 1e4, -1e30, 1e30]
gate = st.floats(-100, 100, width=32) | st.sampled_from(EXTREMES)
shapes = st.sampled_from([(1,), (2,), (4,), (8,), (4, 3), (4, 2, 3)])  # few, because each shape is compiled
gates = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=gate))
fraction = st.floats(0, 1, width=32)


def leaves(policy, logits):
    """Returns whether tokens leave at each loop by their gates; at the last loop every token leaves."""
    survival = log_survival(jnp.asarray(logits))
    loops = np.broadcast_to(np.arange(1, len(logits) + 1).reshape(-1, *[1] * (logits.ndim - 1)), logits.shape)
    signals = Signals(loop=jnp.asarray(loops, jnp.int32), gate_logits=jnp.asarray(logits), log_survival=survival)
    return np.asarray(policy.exits(signals).at[-1].set(True))


@given(gates)
def test_sums_to_one(logits):
    pdf = exit_distribution(jnp.asarray(logits))
    np.testing.assert_allclose(jnp.sum(pdf, axis=0), 1.0, atol=1e-5)
    assert (pdf >= 0).all()


@given(gates)
def test_equals_the_definition_in_float64(logits):
    wide = logits.astype(np.float64)
    stop, go = np.exp(-np.logaddexp(0, -wide)), np.exp(-np.logaddexp(0, wide))
    survival = np.cumprod(np.concatenate([np.ones_like(wide[:1]), go[:-1]]), axis=0)
    expected = np.concatenate([(stop * survival)[:-1], survival[-1:]])
    np.testing.assert_allclose(exit_distribution(jnp.asarray(logits)), expected, rtol=2e-4, atol=1e-6)


@given(gates)
def test_log_survival_is_the_log_of_one_minus_the_cdf(logits):
    cdf = exit_cdf(exit_distribution(jnp.asarray(logits)))
    survival = jnp.exp(log_survival(jnp.asarray(logits)))
    np.testing.assert_allclose(cdf[:-1], 1 - survival[:-1], atol=2e-6)


@given(gates)
def test_cdf_rises_to_exactly_one(logits):
    cdf = exit_cdf(exit_distribution(jnp.asarray(logits)))
    assert (np.diff(cdf, axis=0) >= 0).all()
    assert (cdf[-1] == 1).all()
    assert (cdf >= -1e-6).all()


@given(gates)
def test_last_gate_is_ignored(logits):
    other = logits.copy()
    other[-1] = -other[-1] + 1
    same = (log_exit_distribution(jnp.asarray(x)) for x in (logits, other))
    np.testing.assert_array_equal(*same)


@given(gates)
def test_entropy_is_between_zero_and_log_t(logits):
    found = entropy(log_pdf=log_exit_distribution(jnp.asarray(logits)))
    assert (found >= -1e-6).all()
    assert (found <= np.log(len(logits)) + 1e-5).all()


@given(gates)
def test_mean_exit_loop_is_between_one_and_t(logits):
    mean = mean_exit_loop(exit_distribution(jnp.asarray(logits)))
    assert (mean >= 1 - 1e-5).all()
    assert (mean <= len(logits) * (1 + 1e-5)).all()


@given(gates)
def test_q_zero_is_the_first_loop_and_q_one_the_last(logits):
    pdf = exit_distribution(jnp.asarray(logits))
    assert (q_exit(pdf, 0.0) == 1).all()
    assert (q_exit(pdf, 1.0) == len(logits)).all()


@pytest.mark.parametrize("logit", [-80.0, 80.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_q_one_is_the_last_loop_though_the_sigmoid_is_saturated(logit, dtype):
    pdf = exit_distribution(jnp.full((4, 2), logit, dtype))
    assert pdf.dtype == jnp.float32
    assert (q_exit(pdf, 1.0) == 4).all()
    assert (q_exit(pdf, 0.0) == 1).all()
    assert not leaves(QExit(q=1.0), jnp.full((4, 2), logit, dtype))[:-1].any()


@given(gates, fraction)
def test_q_exit_is_the_first_loop_whose_cdf_reaches_q(logits, q):
    pdf = np.asarray(exit_distribution(jnp.asarray(logits)), np.float64)
    cdf = np.cumsum(pdf, axis=0)
    cdf[-1] = 1.0
    assume(np.abs(cdf[:-1] - q).min(initial=1.0) > 1e-5)  # ties depend on rounding
    first = np.argmax(cdf >= q, axis=0) + 1
    np.testing.assert_array_equal(q_exit(jnp.asarray(pdf, jnp.float32), q), first)


@given(gates, fraction, fraction)
def test_a_higher_q_never_exits_earlier(logits, one, other):
    pdf = exit_distribution(jnp.asarray(logits))
    low, high = sorted((one, other))
    assert (q_exit(pdf, low) <= q_exit(pdf, high)).all()


@given(gates, fraction)
def test_policy_on_survival_agrees_with_q_exit_on_the_distribution(logits, q):
    survival = log_survival(jnp.asarray(logits))
    with np.errstate(divide="ignore"):
        threshold = np.log1p(-np.float32(q))
    assume(np.abs(survival[:-1] - threshold).min(initial=1.0) > 1e-4)
    by_policy = np.argmax(leaves(QExit(q=q), logits), axis=0) + 1
    np.testing.assert_array_equal(q_exit(exit_distribution(jnp.asarray(logits)), q), by_policy)


@jax.jit
@jax.grad
def gradient_of_everything(logits):
    log_pdf, pdf = log_exit_distribution(logits), exit_distribution(logits)
    return jnp.sum(entropy(log_pdf=log_pdf)) + jnp.sum(pdf**2) + jnp.sum(mean_exit_loop(pdf))


@given(gates)
def test_gradients_are_finite(logits):
    assert np.isfinite(gradient_of_everything(jnp.asarray(logits))).all()


def test_entropy_of_equal_exits_is_log_t():
    equal = jnp.log(jnp.array([1 / 3, 1 / 2, 1.0, 1.0]))  # logits of lambda = 1/4, 1/3, 1/2
    np.testing.assert_allclose(entropy(log_pdf=log_exit_distribution(equal)), np.log(4), rtol=1e-6)


@given(gates, st.integers(0, 999))
def test_log_exit_probability_is_that_of_the_distribution(logits, seed):
    loops = np.random.default_rng(seed).integers(1, len(logits) + 1, logits.shape[1:]).astype(np.int32)
    ours = log_exit_probability(jnp.asarray(logits), jnp.asarray(loops))
    expected = np.take_along_axis(np.asarray(log_exit_distribution(jnp.asarray(logits))), loops[None] - 1, axis=0)[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("deeper", [np.nan, np.inf, -np.inf, 0.0])
def test_gates_after_the_exit_are_not_read(deeper):
    logits = jnp.array([[0.5, -1.0], [0.25, 2.0], [1.0, -3.0], [4.0, 5.0]])
    loops = jnp.array([2, 4], jnp.int32)
    unread = np.array([[False, False], [False, False], [True, False], [True, True]])
    of_all = jax.value_and_grad(lambda gates: jnp.sum(log_exit_probability(gates, loops)))
    value, gradient = of_all(jnp.where(unread, deeper, logits))
    expected, _ = of_all(logits)
    assert value == expected
    np.testing.assert_array_equal(np.asarray(gradient)[unread], 0)
    assert np.all(np.asarray(gradient)[~unread] != 0)


def test_float64_gates_stay_float64():
    with jax.enable_x64(True):
        logits = jnp.linspace(-3, 3, 4)
        pdf = halting.exit_distribution(logits)
        assert logits.dtype == pdf.dtype == halting.exit_cdf(pdf).dtype == jnp.float64
        np.testing.assert_allclose(jnp.sum(pdf), 1, rtol=1e-15)
