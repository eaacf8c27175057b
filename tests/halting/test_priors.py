"""Laws of the priors over exit loops, and of the divergence from a prior."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from looplm_jax import halting
from looplm_jax.config import PriorConfig, PriorKind

LOOPS = [1, 2, 4, 8]
rates = st.floats(0.01, 0.99)
means = st.floats(1.1, 20)
sigmas = st.floats(0.05, 1.5)


@given(st.sampled_from(LOOPS), rates, means, sigmas, st.sampled_from(PriorKind))
def test_every_prior_is_normalized(loops, rate, mean, sigma, kind):
    log_prior = halting.log_prior(PriorConfig(kind=kind, rate=rate, mean=mean, sigma=sigma), loops)
    assert log_prior.shape == (loops,)
    assert np.isfinite(log_prior).all()
    np.testing.assert_allclose(jnp.sum(jnp.exp(log_prior)), 1.0, rtol=1e-5)


def test_configuration_names_the_prior():
    for kind, expected in [
        (PriorKind.UNIFORM, halting.log_uniform_prior(4)),
        (PriorKind.GEOMETRIC, halting.log_geometric_prior(4, 0.3)),
        (PriorKind.POISSON_LOG_NORMAL, halting.log_poisson_lognormal_prior(4, 3.0, 0.7)),
    ]:
        config = PriorConfig(kind=kind, rate=0.3, mean=3.0, sigma=0.7)
        np.testing.assert_array_equal(halting.log_prior(config, 4), expected)


@pytest.mark.parametrize("loops", LOOPS)
def test_uniform_is_one_over_t(loops):
    np.testing.assert_allclose(jnp.exp(halting.log_uniform_prior(loops)), np.full(loops, 1 / loops), rtol=1e-6)


@given(rates)
def test_geometric_falls_by_the_same_ratio_at_every_loop(rate):
    prior = jnp.exp(halting.log_geometric_prior(8, rate))
    np.testing.assert_allclose(prior[1:], prior[:-1] * np.float32(1 - rate), rtol=1e-4)


@pytest.mark.parametrize(("mean", "sigma"), [(4.0, 0.5), (2.0, 1.0), (9.0, 0.2)])
def test_poisson_log_normal_equals_its_simulation(mean, sigma):
    random, draws = np.random.default_rng(0), 200_000
    rate = np.exp(random.normal(np.log(mean - 1) - sigma**2 / 2, sigma, draws))
    loops = 1 + random.poisson(rate)
    counts = np.bincount(loops[loops <= 12], minlength=13)[1:]
    simulated = counts / counts.sum()
    np.testing.assert_allclose(
        jnp.exp(halting.log_poisson_lognormal_prior(12, mean, sigma)), simulated, atol=4 / draws**0.5
    )


@pytest.mark.parametrize(("mean", "sigma"), [(4.0, 0.5), (2.0, 0.3), (30.0, 0.5)])
def test_poisson_log_normal_has_its_mean_where_nothing_is_cut_off(mean, sigma):
    prior = jnp.exp(halting.log_poisson_lognormal_prior(400, mean, sigma))
    np.testing.assert_allclose(halting.mean_exit_loop(prior), mean, rtol=1e-3)


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(-50, 50, width=32)), rates)
def test_divergence_is_never_negative(logits, rate):
    log_pdf = halting.log_exit_distribution(jnp.asarray(logits))
    assert (halting.kl_divergence(log_pdf=log_pdf, log_prior=halting.log_geometric_prior(4, rate)) >= -1e-5).all()


@given(st.sampled_from([2, 4, 8]), rates)
def test_divergence_is_zero_at_the_prior(loops, rate):
    prior = halting.log_geometric_prior(loops, rate)
    log_pdf = jnp.broadcast_to(prior[:, None], (loops, 3))
    np.testing.assert_array_equal(halting.kl_divergence(log_pdf=log_pdf, log_prior=prior), np.zeros(3))


@given(hnp.arrays(np.float32, (4, 3), elements=st.floats(-50, 50, width=32)))
def test_divergence_from_uniform_is_log_t_minus_entropy(logits):
    log_pdf = halting.log_exit_distribution(jnp.asarray(logits))
    expected = np.log(4) - halting.entropy(log_pdf=log_pdf)
    np.testing.assert_allclose(
        halting.kl_divergence(log_pdf=log_pdf, log_prior=halting.log_uniform_prior(4)), expected, atol=1e-5
    )
