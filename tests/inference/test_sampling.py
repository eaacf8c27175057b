import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.errors import UserError
from looplm_jax.inference.sampling import Sampling, sample, shortlist, token_key
from looplm_jax.inference.traced import Traced

VOCABULARY = 11
seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.05, 5.0)


@jax.jit
def kept_of(logits, traced):
    kept = shortlist(logits, traced.settings())
    return jnp.zeros(VOCABULARY, bool).at[kept.tokens].set(jnp.isfinite(kept.logits))


@jax.jit
def many(logits, traced):
    settings = traced.settings()
    keys = jax.vmap(lambda number: token_key(settings, number))(jnp.arange(64))
    return jax.vmap(lambda key: sample(logits, settings, key))(keys)


def random_logits(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=VOCABULARY) * 3, jnp.float32)


@given(seed=seeds, temperature=temperatures, top_k=st.integers(0, 20))
def test_top_k_keeps_the_k_most_probable(seed, temperature, top_k):
    logits = random_logits(seed)
    kept = kept_of(logits, Traced.of(Sampling(temperature=temperature, top_k=top_k)))
    count = min(top_k or VOCABULARY, VOCABULARY)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-logits)[:count])


@given(seed=seeds, temperature=temperatures, top_p=st.floats(1e-9, 1.0))
def test_top_p_keeps_the_fewest_that_reach_p(seed, temperature, top_p):
    logits = random_logits(seed)
    kept = np.asarray(kept_of(logits, Traced.of(Sampling(temperature=temperature, top_p=top_p))))
    scaled = np.asarray(logits, np.float64) / temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    smallest = probabilities[kept].min()
    assert kept.any()
    assert probabilities[kept].sum() >= top_p - 1e-5
    assert probabilities[kept].sum() - smallest <= top_p + 1e-5
    assert (probabilities[~kept] <= smallest).all()


@given(seed=seeds, temperature=temperatures, top_k=st.integers(1, 11), top_p=st.floats(0.1, 1.0))
def test_only_kept_tokens_are_drawn(seed, temperature, top_k, top_p):
    logits = random_logits(seed)
    traced = Traced.of(Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed))
    assert set(np.asarray(many(logits, traced))) <= set(np.flatnonzero(kept_of(logits, traced)))


@given(seed=seeds)
def test_greedy_and_a_shortlist_of_one_are_the_arg_max(seed):
    logits = random_logits(seed)
    for sampling in (Sampling(), Sampling(temperature=2, top_k=1), Sampling(temperature=2, top_p=1e-12)):
        assert set(np.asarray(many(logits, Traced.of(sampling)))) == {int(jnp.argmax(logits))}


def test_without_cuts_everything_is_kept_even_where_sums_pass_one():
    logits = jnp.full(VOCABULARY, 0.1).at[0].set(30.0)
    assert kept_of(logits, Traced.of(Sampling(temperature=1.0))).all()


def test_frequencies_follow_the_temperature():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    settings = Sampling(temperature=0.5)
    keys = jax.random.split(jax.random.key(0), 20000)
    drawn = jax.jit(jax.vmap(lambda key: sample(logits, settings, key)))(keys)
    expected = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20000, expected, atol=0.015)


def test_traced_settings_equal_the_plain_ones():
    settings = Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3)
    logits = random_logits(0)
    plain = [int(sample(logits, settings, token_key(settings, number))) for number in range(8)]
    np.testing.assert_array_equal(many(logits, Traced.of(settings))[:8], plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"temperature must not be negative, not -1.0; 0 takes the likeliest token"),
        ({"temperature": float("nan")}, "temperature must not be negative, not nan"),
        ({"temperature": float("inf")}, "temperature must not be negative, not inf"),
        ({"top_k": -3}, "top_k must not be negative, not -3; 0 keeps all tokens"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0; 1 keeps all tokens"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], not 1.5"),
        ({"seed": -1}, "seed must be in 0..2147483647, not -1"),
        ({"seed": 2**31}, "seed must be in 0..2147483647"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
