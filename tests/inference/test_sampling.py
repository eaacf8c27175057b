import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from looplm_jax.errors import UserError
from looplm_jax.inference import _sampling as sampling_module
from looplm_jax.inference._sampling import Sampling, SamplingTable, probabilities, sample, sample_rows, token_key

VOCABULARY = 11
seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.3, 5.0)
samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), temperatures),
    top_k=st.integers(0, 15),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(0.5, 2.0),
    seed=seeds,
)
choose = jax.jit(sample_rows)
distribution = jax.jit(probabilities)


@jax.jit
def many(logits, settings):
    keys = jax.vmap(lambda number: token_key(settings, number))(jnp.arange(64))
    return jax.vmap(lambda key: sample(logits, settings, key))(keys)


def random_logits(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, VOCABULARY)) * 3, jnp.float32)


def table_of(*settings):
    table = SamplingTable.empty(len(settings))
    for slot, sampling in enumerate(settings):
        table = table.with_sampling(slot, sampling)
    return table


def kept_of(logits, **settings):
    return np.asarray(distribution(logits, SamplingTable.of(Sampling(**settings)))) > 0


def softmax(scaled):
    weights = np.exp(np.asarray(scaled, np.float64) - np.max(scaled))
    return weights / weights.sum()


@given(seed=seeds, temperature=temperatures, top_k=st.integers(0, 20))
def test_top_k_keeps_the_k_most_probable(seed, temperature, top_k):
    logits = random_logits(seed)
    kept = kept_of(logits, temperature=temperature, top_k=top_k)
    count = min(top_k or VOCABULARY, VOCABULARY)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-logits)[:count])


@given(seed=seeds, temperature=temperatures, top_p=st.floats(1e-46, 1.0), top_k=st.integers(0, 15))
@example(seed=0, temperature=1.0, top_p=1e-46, top_k=0)
def test_top_p_keeps_the_fewest_that_reach_p_of_what_top_k_left(seed, temperature, top_p, top_k):
    logits = random_logits(seed)
    kept = kept_of(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    left = kept_of(logits, temperature=temperature, top_k=top_k)
    shares = softmax(np.where(left, logits, -np.inf) / temperature)
    smallest = shares[kept].min()
    assert kept.any()
    assert shares[kept].sum() >= top_p - 1e-5
    assert shares[kept].sum() - smallest <= top_p + 1e-5
    assert (shares[~kept] <= smallest).all()


@given(seed=seeds, temperature=temperatures, min_p=st.floats(0.0, 1.0))
def test_min_p_keeps_what_is_near_the_likeliest(seed, temperature, min_p):
    logits = random_logits(seed)
    kept = kept_of(logits, temperature=temperature, min_p=min_p)
    ratios = softmax(logits / temperature) / softmax(logits / temperature).max()
    assert kept[ratios > min_p * (1 + 1e-5)].all()
    assert not kept[ratios < min_p * (1 - 1e-5)].any()
    assert kept[np.argmax(logits)]


@given(seed=seeds, temperature=temperatures, penalty=st.floats(0.5, 2.0))
def test_the_temperature_comes_after_the_repetition_penalty(seed, temperature, penalty):
    logits, seen = random_logits(seed), np.arange(VOCABULARY) % 2 == 0
    sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
    drawn_from = distribution(logits, SamplingTable.of(sampling), seen)
    changed = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
    np.testing.assert_allclose(drawn_from, softmax(changed / temperature), atol=1e-5)


@given(seed=seeds, sampling=samplings)
def test_cuts_only_leave_out(seed, sampling):
    logits = random_logits(seed)
    drawn_from = np.asarray(distribution(logits, SamplingTable.of(sampling)))
    assert drawn_from.sum() == pytest.approx(1, abs=1e-5)
    kept = drawn_from > 0
    uncut = softmax(logits / sampling.temperature)[kept] if sampling.temperature > 0 else np.ones(1)
    np.testing.assert_allclose(drawn_from[kept], uncut / uncut.sum(), atol=1e-5)


@given(seed=seeds, sampling=samplings)
def test_only_kept_tokens_are_drawn(seed, sampling):
    logits = random_logits(seed)
    kept = np.flatnonzero(distribution(logits, SamplingTable.of(sampling)))
    assert set(np.asarray(many(logits, SamplingTable.of(sampling)))) <= set(kept)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.5, "top_k": 6},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 3.0, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
)
def test_frequencies_are_those_of_the_distribution(settings):
    draws, sampling = 20_000, Sampling(**settings, seed=5)
    logits, seen = random_logits(1), jnp.arange(VOCABULARY) < 4
    table = jax.tree.map(lambda number: jnp.broadcast_to(number, draws), SamplingTable.of(sampling))
    rows = [jnp.broadcast_to(row, (draws, VOCABULARY)) for row in (logits, seen)]
    choice = choose(rows[0], table, jnp.arange(draws), rows[1])
    drawn_from = np.asarray(distribution(logits, SamplingTable.of(sampling), seen), np.float64)
    counts, likely = np.bincount(choice.tokens, minlength=VOCABULARY), drawn_from * draws >= 5
    assert not counts[drawn_from == 0].any()
    observed, expected = ([*x[likely], x[~likely].sum()] for x in (counts, drawn_from / drawn_from.sum() * draws))
    cells = len(observed) if expected[-1] > 0 else len(observed) - 1
    assert stats.chisquare(observed[:cells], expected[:cells], sum_check=False).pvalue > 1e-3


@given(seed=seeds, sampling=samplings, slot=st.integers(0, 3), neighbours=st.lists(samplings, min_size=3, max_size=3))
def test_a_request_draws_the_same_in_any_slot_beside_any_neighbours(seed, sampling, slot, neighbours):
    logits, counts = random_logits(seed, 4), jnp.array([3, 1, 4, 1])
    seen = logits > 1
    alone = choose(logits[slot][None], table_of(sampling), counts[slot][None], seen[slot][None])
    settings = [*neighbours[:slot], sampling, *neighbours[slot:]]
    among = choose(logits, table_of(*settings), counts, seen)
    assert among.tokens[slot] == alone.tokens[0]
    np.testing.assert_allclose(among.log_probs[slot], alone.log_probs[0], atol=1e-6)


def test_keys_depend_on_the_seed_and_the_number_of_the_token():
    logits = jnp.zeros((6, 1000))
    table = table_of(*(Sampling(temperature=1.0, seed=seed) for seed in (1, 1, 1, 2, 2, 2)))
    tokens = choose(logits, table, jnp.array([0, 1, 0, 0, 1, 0])).tokens.tolist()
    assert tokens[0] == tokens[2]
    assert tokens[3] == tokens[5]
    assert len(set(tokens)) == 4


def test_a_single_row_draws_as_one_of_many():
    settings = Sampling(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, seed=3)
    logits = random_logits(0)
    draw = jax.jit(lambda number: sample(logits, settings, token_key(settings, number)))
    plain = [int(draw(number)) for number in range(8)]
    rows = choose(jnp.broadcast_to(logits, (8, VOCABULARY)), table_of(*[settings] * 8), jnp.arange(8))
    np.testing.assert_array_equal(many(logits, SamplingTable.of(settings))[:8], plain)
    np.testing.assert_array_equal(rows.tokens, plain)


@given(seed=seeds)
def test_greedy_and_a_shortlist_of_one_are_the_arg_max(seed):
    logits = random_logits(seed)
    for sampling in (
        Sampling(),
        Sampling(temperature=1e-30),
        Sampling(temperature=2, top_k=1),
        Sampling(temperature=2, top_p=1e-12),
        Sampling(temperature=2, min_p=1),
    ):
        assert set(np.asarray(many(logits, SamplingTable.of(sampling)))) == {int(jnp.argmax(logits))}


def test_greedy_takes_the_likeliest_after_the_penalty():
    logits, seen = jnp.array([[2.0, 1.5, -1.0], [-1.0, -1.5, -3.0]]), jnp.array([[True, False, False]] * 2)
    penalty = Sampling(repetition_penalty=2.0)
    assert choose(logits, table_of(penalty, penalty), jnp.zeros(2, jnp.int32), seen).tokens.tolist() == [1, 1]
    assert choose(logits, table_of(penalty, Sampling()), jnp.zeros(2, jnp.int32), seen).tokens.tolist() == [1, 0]
    assert jax.jit(lambda: sample(logits[0], penalty, jax.random.key(0), seen[0]))() == 1
    np.testing.assert_array_equal(distribution(logits, SamplingTable.of(penalty), seen), [[0, 1, 0]] * 2)


@given(seed=seeds, sampling=samplings)
def test_log_probs_are_those_of_the_raw_logits(seed, sampling):
    logits = random_logits(seed, 2)
    choice = choose(logits, table_of(sampling, Sampling()), jnp.zeros(2, jnp.int32), logits > 0)
    raw = np.log([softmax(row) for row in logits])
    np.testing.assert_allclose(choice.log_probs, raw[np.arange(2), choice.tokens], atol=1e-5)


def test_without_cuts_everything_is_kept_even_where_sums_pass_one():
    logits = jnp.full(VOCABULARY, 0.1).at[0].set(30.0)
    assert kept_of(logits, temperature=1.0).all()


def test_tokens_as_probable_as_the_last_one_kept_are_kept():
    logits = jnp.array([1.0, 3.0, 2.0, 2.0, 0.0])
    np.testing.assert_array_equal(kept_of(logits, temperature=1.0, top_k=2), [False, True, True, True, False])


def test_a_token_of_no_probability_is_never_drawn():
    logits = random_logits(0).at[jnp.arange(5)].set(-jnp.inf)
    assert set(np.asarray(many(logits, SamplingTable.of(Sampling(temperature=100.0))))) <= set(range(5, VOCABULARY))


def test_cuts_in_a_large_vocabulary():
    logits = jnp.asarray(np.random.default_rng(0).permutation(150_000) / 1e5, jnp.float32)
    kept = kept_of(logits, temperature=1.0, top_k=1000)
    assert set(np.flatnonzero(kept)) == set(np.argsort(-logits)[:1000])


def test_settings_compile_nothing():
    logits, counts, table = random_logits(0, 3), jnp.zeros(3, jnp.int32), SamplingTable.empty(3)
    sizes = []
    for slot, top_k in enumerate((0, 3, 7)):
        table = table.with_sampling(slot, Sampling(temperature=0.5 * slot, top_k=top_k, min_p=0.1 * slot))
        choose(logits, table, counts)
        sizes.append((choose._cache_size(), sampling_module._replace_row._cache_size()))
    assert len(set(sizes)) == 1


def test_greedy_rows_cost_no_draw():
    """Random numbers and the loops of the cut-offs run only on the condition that some row is not greedy."""
    text = str(jax.make_jaxpr(sample_rows)(random_logits(0, 3), SamplingTable.empty(3), jnp.zeros(3, jnp.int32)))
    before, after = text.split(" cond[", 1)
    assert "random_bits" in after
    assert "scan[" in after
    assert not any(costly in before for costly in ("random_bits", "scan[", "while[", "sort["))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"temperature must not be negative, not -1.0; 0 takes the likeliest token"),
        ({"temperature": float("nan")}, "temperature must not be negative, not nan"),
        ({"temperature": float("inf")}, "temperature must not be negative, not inf"),
        ({"top_k": -3}, "top_k must not be negative, not -3; 0 keeps all tokens"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0; 1 keeps all tokens"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], not 1.5"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], not -0.1; 0 keeps all tokens"),
        ({"min_p": float("nan")}, r"min_p must be in \[0, 1\], not nan"),
        ({"repetition_penalty": 0}, "repetition_penalty must be positive, not 0.0; 1 changes nothing"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be positive, not inf"),
        ({"seed": -1}, "seed must be in 0..2147483647, not -1"),
        ({"seed": 2**31}, "seed must be in 0..2147483647"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
