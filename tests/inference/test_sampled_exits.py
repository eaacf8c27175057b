"""Exits that are drawn, and the policy over tokens and exits that a replay differentiates.

A model of two loops and three tokens has 216 continuations of three tokens, each with its exit loops. All of them are
replayed at once, so sums over the policy are exact.
"""

import functools
import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model
from scipy import stats

from looplm_jax.errors import UserError
from looplm_jax.halting import QExit, SampledExit, exit_loops, log_exit_distribution
from looplm_jax.inference import (
    CacheStrategy,
    Engine,
    EngineConfig,
    Request,
    Result,
    Rollouts,
    Sampling,
    replay_scores,
    rollout_gap,
)
from looplm_jax.inference._sampling import SamplingTable, exit_draws
from looplm_jax.inference._stopping import Finish
from looplm_jax.inference._tick import logits_of

LOOPS, VOCABULARY, NEW = 2, 3, 3
PROMPT = (1, 2)
ACTIONS = list(itertools.product(range(1, LOOPS + 1), range(VOCABULARY)))
PATHS = list(itertools.product(ACTIONS, repeat=NEW))
REWARDS = np.random.default_rng(3).normal(size=len(PATHS)).astype(np.float32)


@functools.cache
def small_model():
    return make_model(num_layers=1, loops=LOOPS, vocab_size=VOCABULARY)


def result_of(path):
    return Result(
        prompt_ids=PROMPT,
        tokens=tuple(token for _, token in path),
        exit_loops=tuple(loop for loop, _ in path),
        log_probs=(),
        text="",
        finish=Finish.LENGTH,
    )


@functools.cache
def all_paths():
    return Rollouts.of([result_of(path) for path in PATHS], loops=LOOPS, longest=64, tight=True)


@functools.cache
def full_depth():
    """Returns the output of a plain pass over all paths, read where new tokens are predicted."""
    model, params = small_model()
    paths = all_paths()

    @jax.jit
    def read(params):
        output = model.apply({"params": params}, paths.joined(), loops=LOOPS)
        hidden = jnp.take_along_axis(output.hidden, paths.read_positions[None, ..., None], axis=2)
        gate_logits = jnp.take_along_axis(output.gate_logits, paths.read_positions[None], axis=2)
        return jax.nn.log_softmax(logits_of(model, params, hidden)), log_exit_distribution(gate_logits)

    return jax.device_get(read(params))


@functools.cache
def scores_of_paths():
    """Returns the replay of all paths, with the scores of every loop."""
    return replay_scores(*small_model(), all_paths(), loops=LOOPS, per_loop=True)


def path_log_probs(params, strategy=CacheStrategy.FULL):
    """Returns `log pi` of each path."""
    return _path_log_probs(params, all_paths(), strategy)


@functools.partial(jax.jit, static_argnames="strategy")
def _path_log_probs(params, paths, strategy):
    scores = replay_scores(small_model()[0], params, paths, strategy=strategy, loops=LOOPS)
    return jnp.sum(scores.token + scores.exit, axis=1)


# The policy of a replay


@pytest.mark.parametrize("strategy", [CacheStrategy.FULL, CacheStrategy.LAST])
def test_actions_of_a_replay_are_a_distribution(strategy):
    log_probs = path_log_probs(small_model()[1], strategy)
    assert len(PATHS) == 216
    assert np.exp(np.asarray(log_probs, np.float64)).sum() == pytest.approx(1, abs=2e-6)


def test_a_full_depth_pass_is_another_policy():
    """Read at the exit loops, it is right for two tokens: the third one sees what an exit has left undone."""
    paths, scores = all_paths(), scores_of_paths()
    log_probs, exits = full_depth()
    at_exit = np.asarray(paths.exit_loops) - 1, *np.indices(paths.tokens.shape)
    full = log_probs[(*at_exit, np.asarray(paths.tokens))] + exits[at_exit]

    difference = np.abs(full - (scores.token + scores.exit)).max(axis=0)
    np.testing.assert_allclose(difference[:2], 0, atol=1e-5)
    assert difference[2] > 0.01


def test_the_gradient_of_the_expected_reward():
    """It is a slope, and `sum pi R grad log pi`."""
    params = small_model()[1]
    all_paths()  # not inside a trace

    def expected(params):
        return jnp.sum(REWARDS * jnp.exp(path_log_probs(params)))

    def surrogate(params):
        log_probs = path_log_probs(params)
        return jnp.sum(REWARDS * jax.lax.stop_gradient(jnp.exp(log_probs)) * log_probs)

    gradient, by_score = jax.jit(lambda params: (jax.grad(expected)(params), jax.grad(surrogate)(params)))(params)
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradient)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * size), gradient, by_score)
    assert np.abs(gradient["gate"]["kernel"]).max() > 0.01 * size

    def moved(step):
        there = jax.tree.map(lambda leaf, along: leaf + np.float32(step / size) * along, params, gradient)
        return np.sum(REWARDS * np.exp(np.asarray(path_log_probs(there), np.float64)))

    assert (moved(3e-3) - moved(-3e-3)) / 6e-3 == pytest.approx(size, rel=2e-3)


def test_scores_at_every_loop():
    """They include that of the exit loop, and those of a path at full depth are those of a plain pass."""
    paths, scores = all_paths(), scores_of_paths()
    assert scores.per_loop.shape == (LOOPS, *paths.tokens.shape)
    np.testing.assert_allclose(np.sum(scores.token + scores.exit, axis=1), path_log_probs(small_model()[1]), atol=1e-5)

    deep = np.flatnonzero((np.asarray(paths.exit_loops) == LOOPS).all(axis=1))
    log_probs, _ = full_depth()
    expected = np.take_along_axis(log_probs, np.asarray(paths.tokens)[None, ..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.per_loop[:, deep], expected[:, deep], atol=1e-5)

    with pytest.raises(UserError, match=r"^scores at every loop need the cache 'full', not 'last'"):
        replay_scores(*small_model(), paths, loops=LOOPS, strategy=CacheStrategy.LAST, per_loop=True)


# The engine


SLOTS = 32


def small_engine():
    config = EngineConfig(slots=SLOTS, capacity=64, chunk=64, page_size=16, queue=2048)
    return Engine(*small_model(), config=config)


@functools.cache
def sampled():
    """Returns the results of 512 requests with sampled exits, and of others that ran beside them."""
    engine = small_engine()
    requests = engine.requests(
        [PROMPT] * 512, max_new_tokens=NEW, policy=SampledExit(), sampling=Sampling(temperature=1.0, seed=5)
    )
    others = [
        Request(
            prompt_ids=(0, 1, 0, number % 3),
            max_new_tokens=6,
            policy=QExit(q=0.6),
            sampling=Sampling(temperature=1.0, index=number),
            stop_ids=(2,),
        )
        for number in range(32)
    ]
    # One of the others after every 16 requests.
    mixed = [
        request for number in range(0, 512, 16) for request in (*requests[number : number + 16], others[number // 16])
    ]
    handles = [engine.submit(request) for request in mixed]
    while engine.step():
        pass
    return [handle.result() for handle in handles]


def test_the_engine_draws_from_the_policy_that_is_replayed():
    """By a chi-square test over the paths, with rare ones together."""
    found = [own for own in sampled() if own.prompt_ids == PROMPT]
    counts = dict.fromkeys(PATHS, 0)
    for own in found:
        counts[tuple(zip(own.exit_loops, own.tokens))] += 1

    expected = len(found) * np.exp(np.asarray(path_log_probs(small_model()[1]), np.float64))
    observed, common = np.array(list(counts.values())), expected >= 5
    assert common.sum() >= 20
    observed = [*observed[common], observed[~common].sum()]
    expected = [*expected[common], expected[~common].sum()]
    assert stats.chisquare(observed, np.array(expected) * sum(observed) / sum(expected)).pvalue > 0.01


def test_log_probabilities_of_the_engine_are_those_of_the_replay():
    """Of tokens and exits, for sampled and other exits, with early stops."""
    model, params = small_model()
    found = sampled()
    assert {len(own.tokens) for own in found} > {1, NEW, 6}
    scores = replay_scores(model, params, Rollouts.of(found, loops=LOOPS, longest=64, tight=True), loops=LOOPS)
    assert rollout_gap(found, scores) <= 1e-4
    # Another depth of one token is seen.
    first = found[0]
    wrong = [Result(**{**vars(first), "exit_loops": (3 - first.exit_loops[0], *first.exit_loops[1:])}), *found[1:]]
    scores = replay_scores(model, params, Rollouts.of(wrong, loops=LOOPS, longest=64, tight=True), loops=LOOPS)
    assert rollout_gap(wrong, scores) > 1e-2


def test_a_draw_belongs_to_a_token_of_a_request():
    """It is that of `exit_draws`, and `exit_loops` decides as the engine does."""
    own = [own for own in sampled() if own.prompt_ids == PROMPT][:8]
    rollouts = Rollouts.of(own, loops=LOOPS, longest=64, tight=True)
    gate_logits = replay_scores(*small_model(), rollouts, loops=LOOPS).gate_logits
    draws = [exit_draws(SamplingTable.of_all([result.sampling] * NEW), jnp.arange(NEW)) for result in own]
    hidden = jnp.zeros((*gate_logits.shape, 1))
    exits = exit_loops(SampledExit(), hidden, gate_logits, lambda states: states, jnp.stack(draws))
    np.testing.assert_array_equal(exits, rollouts.exit_loops)
    with pytest.raises(UserError, match="this exit policy is random: choose another one"):
        exit_loops(SampledExit(), hidden, gate_logits, lambda states: states)


def test_all_slots_are_busy_while_answers_are_generated():
    """The engine needs at most 1 / 0.95 of the ticks of slots that are never idle between two answers."""
    engine = small_engine()
    drawn = Sampling(temperature=1.0, seed=5)
    found = engine.generate([PROMPT] * 16, samples=8, max_new_tokens=48, policy=SampledExit(), sampling=drawn)
    # The first token is read from the prompt. Each later one takes a tick for each of its loops.
    ends = [0] * SLOTS
    for own in found:
        heapq.heappush(ends, heapq.heappop(ends) + sum(own.exit_loops[1:]))
    print(f"{max(ends) / engine.stats.ticks:.3f} of {engine.stats.ticks} ticks are necessary")
    assert max(ends) >= 0.95 * engine.stats.ticks


def test_sizes_of_rollouts_are_tight():
    results = [result_of(PATHS[0]), Result(**{**vars(result_of(PATHS[0])), "prompt_ids": (1,) * 19})]
    rollouts = Rollouts.of(results, loops=LOOPS, longest=64, tight=True)
    assert (rollouts.prompts.shape[1], rollouts.tokens.shape[1], rollouts.size) == (20, NEW, 22)
    assert Rollouts.of(results, loops=LOOPS, longest=64).prompts.shape[1] == 64
