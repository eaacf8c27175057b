"""Prompts, samples and turns have separate random keys, and the same tokens alone and in a batch."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats
from serving_models import CONFIG, LOOPS, Letters, finish, make_engine, small_model

from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import Engine, Sampling, replay, speculate
from looplm_jax.inference._sampling import token_key
from looplm_jax.models._looplm import head_matrix

DRAWN = Sampling(temperature=1.0, seed=11)
PROMPT = (3, 14, 15)


@pytest.fixture(scope="module")
def engine():
    return make_engine()


def test_a_prompt_given_eight_times_is_answered_in_eight_ways(engine):
    """Each answer can be reproduced alone, by its `sampling` or by its number."""
    results = engine.generate([PROMPT] * 8, max_new_tokens=5, sampling=DRAWN)
    assert len({result.tokens for result in results}) == 8
    for index in (0, 5):
        assert results[index].sampling == Sampling(temperature=1.0, seed=11, index=index)
        (again,) = engine.generate([PROMPT], max_new_tokens=5, sampling=results[index].sampling)
        streamed = engine.stream(PROMPT, max_new_tokens=5, sampling=DRAWN.numbered(index))
        assert again.tokens == tuple(new.token for new in streamed) == results[index].tokens


def test_samples_of_a_prompt_stand_side_by_side(engine):
    prompts = [PROMPT, PROMPT, (7,)]
    results = engine.generate(prompts, samples=3, max_new_tokens=5, sampling=DRAWN)
    assert [result.prompt_ids for result in results] == [prompt for prompt in prompts for _ in range(3)]
    assert [(own.sampling.index, own.sampling.sample) for own in results] == [
        (i, j) for i in range(3) for j in range(3)
    ]
    assert len({result.tokens for result in results[:6]}) == 6
    fewer = engine.generate(prompts, samples=2, max_new_tokens=5, sampling=DRAWN)
    assert [own.tokens for own in fewer[::2]] == [own.tokens for own in results[::3]]


def test_an_engine_of_another_shape_draws_the_same(engine):
    other = make_engine(slots=1, chunk=64, ticks=2)
    expected = engine.generate([PROMPT] * 4, samples=2, max_new_tokens=5, sampling=DRAWN)
    found = finish(
        other,
        [
            other.submit(request)
            for request in reversed(other.requests([PROMPT] * 4, samples=2, max_new_tokens=5, sampling=DRAWN))
        ],
    )
    assert [own.tokens for own in reversed(found)] == [own.tokens for own in expected]


def test_keys_do_not_depend_on_the_environment():
    wanted = jax.random.key_data(token_key(DRAWN, 3))
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(jax.random.key_data(token_key(DRAWN, 3)), wanted)


@pytest.mark.parametrize("samples", [0, 1.5, True])
def test_samples_that_cannot_be(engine, samples):
    with pytest.raises(UserError, match=r"^samples must be "):
        engine.generate([PROMPT], samples=samples, max_new_tokens=5)


@pytest.mark.slow
def test_rows_of_speculation_draw_with_keys_of_their_own():
    results = speculate(*small_model(), [PROMPT] * 4, draft_loops=1, drafts=2, max_new_tokens=12, sampling=DRAWN)
    assert len({result.tokens for result in results}) == 4
    others = [(7,), PROMPT, (5, 6), (9, 9)]
    elsewhere = speculate(
        *small_model(), others, draft_loops=1, drafts=2, max_new_tokens=12, sampling=[results[3].sampling] * 4
    )
    assert elsewhere[1].tokens == results[3].tokens


@functools.cache
def next_logits():
    """Returns the logits after the prompt."""
    model, params = small_model()
    output = jax.jit(lambda tokens: model.apply({"params": params}, tokens, loops=LOOPS))(np.array([PROMPT], np.int32))
    return np.asarray(output.hidden[-1, 0, -1]).astype(np.float64) @ np.asarray(head_matrix(params, model.config))


def next_token_distribution(vocabulary):
    logits = next_logits()[:vocabulary]
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_distributed(tokens, probabilities):
    counts, expected = np.bincount(tokens, minlength=probabilities.size), probabilities * len(tokens)
    assert counts.size == probabilities.size
    likely = expected >= 5
    observed, wanted = ([*x[likely], x[~likely].sum()] for x in (counts, expected))
    assert stats.chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


@pytest.mark.parametrize("by", ["prompts", pytest.param("samples", marks=pytest.mark.slow)])
def test_draws_of_one_call_are_distributed_as_the_model_says(engine, by):
    count = {"samples": 600} if by == "samples" else {}
    prompts = [PROMPT] if by == "samples" else [PROMPT] * 600
    results = engine.generate(prompts, max_new_tokens=1, sampling=Sampling(temperature=1.0), **count)
    assert_distributed([result.tokens[0] for result in results], next_token_distribution(96))


class Few(Letters):
    """A tokenizer with fewer tokens than the model has ids."""

    vocab_size = 40


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=50.0, top_k=60)])
def test_ids_beyond_the_tokenizer_are_never_chosen(sampling):
    """By the engine, in drafts, or in previews; log-probabilities equal those of a replay."""
    model, params = small_model()
    padded = Engine(model, params, Few(), config=CONFIG)
    results = padded.generate([(5, number) for number in range(8)], max_new_tokens=12, sampling=sampling)
    results += speculate(
        model, params, [(5, 6, 7)] * 4, draft_loops=1, drafts=2, max_new_tokens=12, sampling=sampling, tokenizer=Few()
    )
    assert max(max(result.tokens) for result in results) < 40
    np.testing.assert_allclose(replay(model, params, results[0]), results[0].log_probs, atol=1e-4)
    with pytest.raises(UserError, match=r"^token 40 of the prompt is not in the vocabulary of 40 tokens"):
        padded.generate([(40,)], max_new_tokens=1)


def test_what_is_left_of_a_padded_vocabulary_keeps_its_distribution():
    padded = Engine(*small_model(), Few(), config=CONFIG)
    drawn = padded.generate(
        PROMPT, samples=300, max_new_tokens=1, sampling=Sampling(temperature=1.0), policy=FixedLoops(loops=LOOPS)
    )
    assert_distributed([result.tokens[0] for result in drawn], next_token_distribution(40))
