"""What each cache strategy means: the engine, a plain decoder and a replay agree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model
from plain_decoder import decode

from looplm_jax.config import Injection
from looplm_jax.errors import UserError
from looplm_jax.halting import QExit
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Request, Result
from looplm_jax.inference.replay import replay, replay_log_probs, states_at_once, states_in_turn
from looplm_jax.inference.rollouts import Rollouts

LOOPS = 3
LONGEST = 128
PLAIN = {"num_layers": 1, "loops": LOOPS}
RICH = {**PLAIN, "prelude_layers": 1, "coda_layers": 1, "injection": Injection.ADD}
SHAPES = {
    CacheStrategy.FULL: RICH,
    CacheStrategy.LAST: PLAIN,
    CacheStrategy.AVERAGE: RICH,
    CacheStrategy.FIRST: PLAIN,
}
REQUESTS = [
    Request(prompt_ids=(5,), max_new_tokens=9, policy=QExit(q=0.6)),
    Request(prompt_ids=tuple(range(1, 40)), max_new_tokens=5, policy=QExit(q=0.0)),
    Request(prompt_ids=(3, 14, 15, 92), max_new_tokens=9, policy=QExit(q=0.4)),
    Request(prompt_ids=(2, 71, 82), max_new_tokens=1, policy=QExit(q=0.5)),
    Request(prompt_ids=(9, 8, 7), max_new_tokens=8, policy=QExit(q=1.0)),
]


@functools.cache
def generated(strategy):
    """A model, its parameters, and what an engine with this cache answered the requests."""
    model, params = make_model(**SHAPES[strategy])
    config = EngineConfig(slots=3, capacity=64, chunk=64, cache=strategy, unroll=False)
    engine = Engine(model, params, config=config)
    tickets = [engine.submit(request) for request in REQUESTS]
    while engine.step():
        pass
    return model, params, [ticket.result() for ticket in tickets]


def batch_of(results):
    return Rollouts.of(results, loops=LOOPS, longest=LONGEST)


@pytest.mark.parametrize("strategy", CacheStrategy)
def test_the_engine_decodes_as_the_strategy_is_defined(strategy):
    model, params, results = generated(strategy)
    assert len({loop for result in results for loop in result.exit_loops}) == LOOPS
    for request, result in zip(REQUESTS, results):
        tokens, exit_loops, log_probs = decode(model, params, request, strategy, request.policy.q)
        assert (result.tokens, result.exit_loops) == (tuple(tokens), tuple(exit_loops))
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)


@pytest.mark.parametrize("strategy", CacheStrategy)
def test_replay_gives_the_log_probabilities_of_generation(strategy):
    model, params, results = generated(strategy)
    log_probs = replay_log_probs(model, params, batch_of(results), strategy=strategy, loops=LOOPS)
    for row, result in zip(np.asarray(log_probs), results):
        np.testing.assert_allclose(row[: len(result.tokens)], result.log_probs, atol=1e-4)
        assert not row[len(result.tokens) :].any()


def test_replay_of_one_result():
    model, params, results = generated(CacheStrategy.LAST)
    found = replay(model, params, results[2], strategy=CacheStrategy.LAST)
    np.testing.assert_allclose(found, results[2].log_probs, atol=1e-4)


def test_in_turn_and_at_once_are_the_same_function():
    """Of a full cache: states, and gradients through them, one of which runs backward by a rule of its own."""
    model, params, results = generated(CacheStrategy.LAST)
    rollouts = batch_of(results)
    generator = np.random.default_rng(1)
    weights = jnp.asarray(generator.normal(size=(*rollouts.tokens.shape, model.config.width)).astype(np.float32))
    weights = jnp.where(rollouts.mask[..., None], weights, 0.0)
    in_turn = functools.partial(states_in_turn, strategy=CacheStrategy.FULL)

    def value_and_gradient(states):
        def total(params):
            return jnp.vdot(weights, states(model, params, rollouts, loops=LOOPS))

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
