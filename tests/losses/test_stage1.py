"""Laws of the Stage I loss (Eq. 4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import assert_trees_close, naive_losses, random_case

from looplm_jax import halting
from looplm_jax.losses import stage1, stage1_from_hidden, token_losses

seeds = st.integers(0, 999)
betas = st.floats(0, 2)


def eq4(losses, gates, beta, mask):
    """Computes Eq. 4 in float64, from its definition."""
    losses, gates, mask = (np.asarray(x, np.float64) for x in (losses, gates, mask))
    lambdas = 1 / (1 + np.exp(-gates))
    total = np.zeros(losses.shape[1:])
    survival = np.ones_like(total)
    for t in range(len(losses)):
        p = survival if t == len(losses) - 1 else lambdas[t] * survival
        total += p * losses[t] + beta * p * np.log(p)
        survival = survival * (1 - lambdas[t])
    return np.sum(total * mask) / np.sum(mask)


@given(seeds, betas)
def test_equals_eq4_by_its_definition(seed, beta):
    case = random_case(seed=seed)
    losses = jnp.abs(case.gates[::-1])
    ours, metrics = stage1(losses, case.gates, beta=beta, mask=case.mask)
    np.testing.assert_allclose(ours, eq4(losses, case.gates, beta, case.mask), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours, metrics.expected_loss - beta * metrics.exit_entropy, rtol=1e-5, atol=1e-5)


@given(seeds, betas)
def test_elbo_with_a_uniform_prior_is_eq4_up_to_beta_log_t(seed, beta):
    case = random_case(seed=seed)
    losses = jnp.abs(case.gates[::-1])
    plain, _ = stage1(losses, case.gates, beta=beta, mask=case.mask)
    elbo, _ = stage1(losses, case.gates, beta=beta, mask=case.mask, log_prior=halting.log_uniform_prior(3))
    np.testing.assert_allclose(elbo - plain, beta * np.log(3), atol=2e-5)


def test_metrics_are_means_over_unmasked_tokens():
    case = random_case()
    losses, pdf = jnp.abs(case.gates[::-1]), halting.exit_distribution(case.gates)
    chosen = np.asarray(case.mask, bool)
    _, metrics = stage1(losses, case.gates, beta=0.1, mask=case.mask)
    assert_trees_close(metrics.loss_per_loop, losses[:, chosen].mean(axis=1))
    assert_trees_close(metrics.exit_pdf, pdf[:, chosen].mean(axis=1))
    assert_trees_close(metrics.mean_exit_loop, halting.mean_exit_loop(pdf)[chosen].mean())
    assert_trees_close(metrics.exit_entropy, halting.entropy(log_pdf=jnp.log(pdf))[chosen].mean())


@pytest.mark.parametrize("prior", [None, halting.log_geometric_prior])
def test_one_pass_over_the_logits_equals_the_loss_on_token_losses(prior):
    case = random_case()
    options = {"beta": 0.3, "mask": case.mask, "log_prior": prior and prior(3, 0.4)}

    def one_pass(hidden, head, gates):
        return stage1_from_hidden(hidden, head, case.targets, gates, chunk=4, **options)

    def two_steps(hidden, head, gates):
        return stage1(token_losses(hidden, head, case.targets, chunk=4), gates, **options)

    def naive(hidden, head, gates):
        return stage1(naive_losses(hidden, head, case.targets), gates, **options)

    results = [
        jax.jit(jax.value_and_grad(way, argnums=(0, 1, 2), has_aux=True))(case.hidden, case.head, case.gates)
        for way in (one_pass, two_steps, naive)
    ]
    assert_trees_close(results[0], results[2])
    assert_trees_close(results[1], results[2])


@functools.partial(jax.jit, static_argnames="with_prior")
def run(hidden, head, gates, targets, mask, with_prior=False):
    def loss(hidden, head, gates):
        log_prior = halting.log_geometric_prior(3, 0.5) if with_prior else None
        return stage1_from_hidden(hidden, head, targets, gates, beta=0.1, mask=mask, log_prior=log_prior, chunk=4)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden, head, gates)


def test_masked_tokens_have_no_influence():
    case, other = random_case(seed=0), random_case(seed=1)
    keep = case.mask > 0
    ours = run(case.hidden, case.head, case.gates, case.targets, case.mask)
    hidden = jnp.where(keep[..., None], case.hidden, other.hidden)
    gates = jnp.where(keep, case.gates, other.gates)
    theirs = run(hidden, case.head, gates, jnp.where(keep, case.targets, other.targets), case.mask)
    assert_trees_close(ours, theirs, 1e-6)
    _, (of_hidden, _, of_gates) = ours
    np.testing.assert_array_equal(of_hidden[:, ~np.asarray(keep)], 0)
    np.testing.assert_array_equal(of_gates[:, ~np.asarray(keep)], 0)


def test_no_mask_is_a_mask_of_ones():
    case = random_case()
    losses = jnp.abs(case.gates[::-1])
    ours = stage1(losses, case.gates, beta=0.1)
    assert_trees_close(ours, stage1(losses, case.gates, beta=0.1, mask=jnp.ones_like(case.mask)), 0)


@pytest.mark.parametrize("with_prior", [False, True])
def test_a_batch_with_every_token_masked_gives_zero(with_prior):
    case = random_case()
    nothing = jnp.zeros_like(case.mask)
    results = run(case.hidden, case.head, case.gates, case.targets, nothing, with_prior=with_prior)
    for leaf in jax.tree.leaves(results):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("logit", [-80.0, 80.0, -1e4, 1e4])
def test_saturated_gates_keep_loss_and_gradients_finite(logit, with_prior):
    case = random_case()
    gates = jnp.full_like(case.gates, logit).at[1].multiply(-1)
    for leaf in jax.tree.leaves(run(case.hidden, case.head, gates, case.targets, case.mask, with_prior=with_prior)):
        assert np.isfinite(leaf).all()


def test_last_gate_gets_no_gradient():
    case = random_case()
    _, (_, _, of_gates) = run(case.hidden, case.head, case.gates, case.targets, case.mask)
    np.testing.assert_array_equal(of_gates[-1], 0)
    assert np.abs(of_gates[0]).max() > 0
