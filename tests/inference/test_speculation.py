import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model
from scipy import stats

from looplm_jax.config import Injection
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Sampling
from looplm_jax.inference.sampling import probabilities
from looplm_jax.inference.speculation import Reroute, Screening, speculate
from looplm_jax.inference.speculation.acceptance import accept
from looplm_jax.inference.speculation.step import draft, read, verify
from looplm_jax.models.looplm import head_matrix

LOOPS = 4
PROMPTS = [[3, 14, 15, 92], [65], [35, 89, 79, 32, 38, 46, 26], [43, 38]]
BATCH = 250
SETTINGS = {"draft_loops": 3, "drafts": 3, "max_new_tokens": 8}
DRAWN = {"draft_loops": 1, "drafts": 2, "max_new_tokens": 3}


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, params, tokens, loops):
    """Logits [N, S, V] of the last loop, without any cache."""
    hidden = model.apply({"params": params}, tokens, loops=loops).hidden[-1]
    return hidden @ head_matrix(params, model.config)


def replayed(model, params, results, length):
    """Logits of the last loop that stand before each new token of each result, [N, n, V]."""
    texts = np.zeros((len(results), length), np.int32)
    for text, result in zip(texts, results, strict=True):
        text[: len(result.prompt_ids) + len(result.tokens)] = result.prompt_ids + result.tokens
    logits = np.asarray(forward(model, params, texts, results[0].loops))
    return [
        own[len(result.prompt_ids) - 1 :][: len(result.tokens)] for own, result in zip(logits, results, strict=True)
    ]


def assert_greedy(model, params, results, length):
    for result, logits in zip(results, replayed(model, params, results, length), strict=True):
        assert result.tokens == tuple(np.argmax(logits, axis=-1))
        log_probs = np.max(logits, axis=-1) - np.logaddexp.reduce(logits, axis=-1)
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)


def draws(seeds, temperature=1.5):
    return [Sampling(temperature=temperature, top_k=4, seed=seed) for seed in seeds]


@pytest.fixture(scope="module")
def prompts():
    """A thousand, of 1 to 12 tokens."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, 97, generator.integers(1, 13)).tolist() for _ in range(4 * BATCH)]


@pytest.fixture(scope="module")
def greedy(tiny_model, prompts):
    """All of them continued, in four batches."""
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return [result for batch in batches for result in speculate(*tiny_model, batch, **SETTINGS)]


@pytest.fixture(scope="module")
def small_vocabulary():
    return make_model(vocab_size=6, loops=3)


def test_greedy_tokens_are_those_of_fixed_loops_on_a_thousand_prompts(tiny_model, greedy):
    for start in range(0, len(greedy), BATCH):
        assert_greedy(*tiny_model, greedy[start : start + BATCH], 20)
    assert {len(result.tokens) for result in greedy} == {8}
    assert {result.finish for result in greedy} == {Finish.LENGTH}


def test_greedy_tokens_are_those_of_the_engine(tiny_model, prompts, greedy):
    engine = Engine(*tiny_model, config=EngineConfig(slots=16, capacity=64, chunk=64))
    expected = engine.generate(prompts[:32], max_new_tokens=8, policy=FixedLoops(loops=LOOPS))
    assert [result.tokens for result in greedy[:32]] == [result.tokens for result in expected]


def test_accepted_drafts_save_passes(greedy):
    rates = np.array([result.acceptance_rate for result in greedy])
    loops = np.array([result.loops_per_token for result in greedy])
    assert 0.1 < rates.mean() < 0.9
    assert np.corrcoef(rates, loops)[0, 1] < -0.9
    round_passes = 3 * SETTINGS["draft_loops"] + LOOPS - SETTINGS["draft_loops"]
    assert all(result.passes % round_passes == 0 for result in greedy)


def test_every_part_of_the_model_takes_part():
    model, params = make_model(prelude_layers=1, coda_layers=1, tied_head=True, injection=Injection.ADD, loops=3)
    results = speculate(model, params, PROMPTS, draft_loops=1, drafts=2, max_new_tokens=6)
    assert_greedy(model, params, results, 16)


def test_a_row_does_not_depend_on_the_others(tiny_model, prompts, greedy):
    """Alone, or among others in another order; drawn or greedy."""
    order = np.random.default_rng(2).permutation(BATCH)
    samplings = [Sampling(temperature=1.0, seed=seed) if seed % 2 else Sampling() for seed in range(BATCH)]
    first = speculate(*tiny_model, prompts[:BATCH], sampling=samplings, **SETTINGS)
    again = speculate(
        *tiny_model, [prompts[row] for row in order], sampling=[samplings[row] for row in order], **SETTINGS
    )
    assert [first[row].tokens for row in order] == [result.tokens for result in again]
    assert [result.tokens for result in first[::2]] == [result.tokens for result in greedy[:BATCH:2]]
    (alone,) = speculate(*tiny_model, prompts[7:8], sampling=samplings[7], **SETTINGS)
    assert alone.tokens == first[7].tokens
    assert (alone.drafted, alone.accepted, alone.passes) == (first[7].drafted, first[7].accepted, first[7].passes)


def test_other_prompts_and_settings_compile_nothing(tiny_model, prompts, greedy):
    programs = (read, draft, verify)
    before = [program._cache_size() for program in programs]
    speculate(
        *tiny_model,
        prompts[-BATCH:],
        sampling=Sampling(temperature=0.7, top_p=0.9, min_p=0.01, seed=3),
        stop_ids=[5],
        **SETTINGS,
    )
    assert [program._cache_size() for program in programs] == before


@pytest.fixture(scope="module")
def drawn(small_vocabulary):
    """Three tokens after one prompt, drawn with 4096 seeds."""
    model, params = small_vocabulary
    return speculate(model, params, [[1, 4, 2]] * 4096, sampling=draws(range(4096)), **DRAWN)


def joint(model, params, loops):
    """Probabilities [V, V] of the two tokens after the prompt."""
    size = model.config.vocab_size
    texts = np.array([[1, 4, 2, token] for token in range(size)])
    first, second = np.moveaxis(
        np.asarray(probabilities(forward(model, params, texts, loops)[:, -2:], draws([0])[0])), 1, 0
    )
    return first[0][:, None] * second


def unlikelihood(drawn, expected):
    """The p-value of a chi-square test that the first two tokens are distributed so."""
    observed = np.zeros_like(expected)
    np.add.at(observed, tuple(np.array([result.tokens[:2] for result in drawn]).T), 1)
    assert observed[expected == 0].sum() == 0 or expected is not None
    possible = expected > 0
    return stats.chisquare(observed[possible], expected[possible] * len(drawn), sum_check=False).pvalue
