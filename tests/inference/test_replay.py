"""The meaning of each cache strategy: the engine, a reference decoder and a replay agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model
from plain_decoder import RING, decode

from looplm_jax.config import Injection
from looplm_jax.errors import UserError
from looplm_jax.halting import QExit, log_exit_probability
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Request, Result
from looplm_jax.inference._replay import replay, replay_log_probs, states_at_once, states_in_turn
from looplm_jax.inference._rollouts import Rollouts

LOOPS = 3
LONGEST = 128
PLAIN = {"num_layers": 1, "loops": LOOPS}
RICH = {**PLAIN, "prelude_layers": 1, "coda_layers": 1, "injection": Injection.ADD}
# One model and one reference decoder serve all but `average`, whose model has every part that a cache may contain.
SHAPES = {
    CacheStrategy.FULL: PLAIN,
    CacheStrategy.LAST: PLAIN,
    CacheStrategy.AVERAGE: RICH,
    CacheStrategy.FIRST: PLAIN,
    RING: PLAIN,
}
SLOW = [
    pytest.param(strategy, marks=pytest.mark.slow)
    for strategy in (CacheStrategy.LAST, CacheStrategy.FIRST, CacheStrategy.AVERAGE)
]
REQUESTS = [
    Request(prompt_ids=(5,), max_new_tokens=9, policy=QExit(q=0.6)),
    Request(prompt_ids=tuple(range(1, 40)), max_new_tokens=5, policy=QExit(q=0.0)),
    Request(prompt_ids=(3, 14, 15, 92), max_new_tokens=9, policy=QExit(q=0.4)),
    Request(prompt_ids=(2, 71, 82), max_new_tokens=1, policy=QExit(q=0.5)),
    Request(prompt_ids=(9, 8, 7), max_new_tokens=8, policy=QExit(q=1.0)),
]


@functools.cache
def make_engine(strategy):
    """Returns a model, its parameters, and an engine with this cache strategy."""
    model, params = make_model(**SHAPES[strategy])
    config = EngineConfig(slots=3, capacity=64, chunk=64, page_size=16, cache=strategy, unroll=False)
    return model, params, Engine(model, params, config=config)


@functools.cache
def generated(strategy):
    """Returns a model, its parameters, and the results of an engine with this cache strategy."""
    model, params, engine = make_engine(strategy)
    handles = [engine.submit(request) for request in REQUESTS]
    while engine.step():
        pass
    return model, params, [handle.result() for handle in handles]


@functools.cache
def conversed(strategy):
    """Returns the results of two conversations of three turns each, in which tokens leave at all loops."""
    engine, results = make_engine(strategy)[-1], []
    for start, qs in ((11, (0.6, 1.0, 0.4)), (12, (0.35, 0.5, 0.6))):
        past, unread = None, ()
        for turn, (count, q) in enumerate(zip((5, 7, 6), qs)):
            prompt = (*unread, *range(start, start + 3 * turn + 2))
            (result,) = engine.generate([prompt], max_new_tokens=count, policy=QExit(q=q), past=past, keep_cache=True)
            past, unread = result.cache, result.tokens[-1:]
            results.append(result)
    return results


def batch_of(results):
    return Rollouts.of(results, loops=LOOPS, longest=LONGEST)


def cut(rollouts, width=12):
    """Removes padding, because a backward pass processes it token by token."""
    assert max(rollouts.lengths.max(), rollouts.prompt_lengths.max()) <= width
    return jax.tree.map(lambda x: x[..., :width] if x.shape[-1] == 64 else x, rollouts)


@pytest.mark.parametrize("strategy", [CacheStrategy.FULL, RING, *SLOW], ids=str)
def test_the_engine_decodes_as_the_strategy_is_defined(strategy):
    model, params, results = generated(strategy)
    assert len({loop for result in results for loop in result.exit_loops}) == LOOPS
    for request, result in zip(REQUESTS, results):
        tokens, exit_loops, log_probs = decode(model, params, request, strategy, request.policy.q)
        assert (result.tokens, result.exit_loops) == (tuple(tokens), tuple(exit_loops))
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)


@pytest.mark.parametrize("strategy", [CacheStrategy.FULL, RING, *SLOW], ids=str)
def test_replay_gives_the_log_probabilities_of_generation(strategy):
    model, params, results = generated(strategy)
    log_probs = replay_log_probs(model, params, batch_of(results), strategy=strategy, loops=LOOPS)
    for row, result in zip(np.asarray(log_probs), results):
        np.testing.assert_allclose(row[: len(result.tokens)], result.log_probs, atol=1e-4)
        assert not row[len(result.tokens) :].any()


@pytest.mark.parametrize("strategy", [CacheStrategy.FULL, pytest.param(RING, marks=pytest.mark.slow), *SLOW], ids=str)
def test_a_turn_that_went_on_from_a_kept_cache_is_replayed_whole(strategy):
    """In one batch of turns with long, short and no history."""
    model, params, _ = generated(strategy)
    results = [*conversed(strategy), generated(strategy)[-1][0]]
    assert len({loop for result in results for turn in result.history for loop in turn.depths}) == LOOPS
    assert [len(result.history) for result in results] == [0, 1, 2, 0, 1, 2, 0]
    log_probs = replay_log_probs(model, params, batch_of(results), strategy=strategy, loops=LOOPS)
    for row, result in zip(np.asarray(log_probs), results):
        np.testing.assert_allclose(row[: len(result.tokens)], result.log_probs, atol=1e-4)


def test_history_says_what_the_cache_holds():
    first, second, third = conversed(CacheStrategy.FULL)[:3]
    assert (first.history, second.history, third.history) == ((), first.cache.turns, second.cache.turns)
    assert [turn.prompt_ids for turn in third.cache.turns] == [own.prompt_ids for own in (first, second, third)]
    assert [turn.tokens for turn in third.history] == [own.tokens[:-1] for own in (first, second)]
    assert [turn.depths for turn in third.history] == [own.exit_loops[1:] for own in (first, second)]
    assert third.cache.lengths.tolist() == [len(third.cache)] == [len(third.cache.tokens)]


@pytest.mark.parametrize("strategy", SLOW)
def test_gradients_of_replay_are_slopes(strategy):
    """Central differences of randomly weighted log-probabilities, along the gradient and in another direction."""
    model, params, results = generated(CacheStrategy.LAST)
    rollouts = cut(batch_of(results[2:]))
    generator = np.random.default_rng(0)
    weights = np.where(rollouts.mask, generator.normal(size=rollouts.tokens.shape), 0).astype(np.float32)

    def weighted(params):
        log_probs = replay_log_probs(model, params, rollouts, strategy=strategy, loops=LOOPS)
        return jnp.vdot(weights, log_probs), log_probs

    program = jax.jit(jax.grad(weighted, has_aux=True))
    gradient = jax.device_get(program(params)[0])
    elsewhere = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), gradient)
    for direction in (gradient, elsewhere):
        unit = normalized(direction)
        slope = sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(unit), jax.tree.leaves(gradient)))
        values = [
            np.vdot(weights, np.asarray(program(moved(params, step, unit))[1], np.float64)) for step in (1e-3, -1e-3)
        ]
        assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=0.02, abs=0.02)


def exits_of(gate_logits, rollouts):
    return log_exit_probability(gate_logits, rollouts.exit_loops)


def normalized(direction):
    length = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(direction)))
    return jax.tree.map(lambda leaf: leaf / length, direction)


def moved(params, step, direction):
    return jax.tree.map(lambda leaf, along: leaf + np.float32(step) * along, params, direction)


def test_replay_of_one_result():
    model, params, results = generated(CacheStrategy.LAST)
    found = replay(model, params, results[2], strategy=CacheStrategy.LAST)
    np.testing.assert_allclose(found, results[2].log_probs, atol=1e-4)


@pytest.mark.slow
def test_in_turn_and_at_once_are_the_same_function():
    """For a full cache: states, and gradients through them, one of which has a custom backward rule."""
    model, params, results = generated(CacheStrategy.LAST)
    rollouts = cut(batch_of([*results[2:], *conversed(CacheStrategy.LAST)]))
    generator = np.random.default_rng(1)
    weights = jnp.asarray(generator.normal(size=(*rollouts.tokens.shape, model.config.width)).astype(np.float32))
    weights = jnp.where(rollouts.mask[..., None], weights, 0.0)
    in_turn = functools.partial(states_in_turn, strategy=CacheStrategy.FULL)

    def value_and_gradient(states):
        def total(params):
            hidden, gate_logits = states(model, params, rollouts, loops=LOOPS)
            # [1, B, N, D] at once, [B, N, D] in turn.
            hidden = hidden.reshape(weights.shape)
            return jnp.vdot(weights, hidden) + jnp.vdot(weights[..., 0], exits_of(gate_logits, rollouts))

        return jax.device_get(jax.jit(jax.value_and_grad(total))(params))

    (value, gradient), (other, expected) = value_and_gradient(in_turn), value_and_gradient(states_at_once)
    np.testing.assert_allclose(value, other, rtol=1e-4)
    size = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * size), gradient, expected)


def failed_result(**changes):
    empty = Result(prompt_ids=(1,), tokens=(), exit_loops=(), log_probs=(), text="", finish=Finish.CANCELLED)
    return dataclasses.replace(empty, **changes)


def test_a_result_without_tokens_has_no_log_probabilities():
    model, params, _ = generated(CacheStrategy.LAST)
    assert replay(model, params, failed_result(), strategy=CacheStrategy.LAST).shape == (0,)


def test_what_cannot_be_replayed():
    model, params, _ = generated(CacheStrategy.LAST)
    beyond = failed_result(tokens=(1,), exit_loops=(5,), log_probs=(0.0,))
    with pytest.raises(UserError, match=r"^a token was chosen at loop 5, beyond loops=3; use the loops of its engine$"):
        replay(model, params, beyond)
    with pytest.raises(UserError, match=r"^there is nothing to replay; give at least one result$"):
        batch_of([])
