import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model

from looplm_jax.config import Injection
from looplm_jax.errors import UserError
from looplm_jax.halting import Bounded, FixedLoops, QExit
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Request, Result
from looplm_jax.inference.replay import replay, replay_log_probs, states_at_once, states_in_turn
from looplm_jax.inference.rollouts import Rollouts

LOOPS = 3
LONGEST = 128
# A prelude, a coda and an injection: everything that a token keeps and reads.
SHAPE = {"num_layers": 1, "prelude_layers": 1, "coda_layers": 1, "injection": Injection.ADD, "loops": LOOPS}
REQUESTS = [
    Request(prompt_ids=(5,), max_new_tokens=7, policy=QExit(q=0.6)),
    Request(prompt_ids=tuple(range(1, 40)), max_new_tokens=4, policy=FixedLoops(loops=2)),
    Request(prompt_ids=(3, 14, 15, 92), max_new_tokens=9, policy=QExit(q=0.4)),
    Request(prompt_ids=(2, 71, 82), max_new_tokens=1),
    Request(prompt_ids=(9, 8, 7), max_new_tokens=8, policy=Bounded(QExit(q=0.3), min_loops=2)),
]


@pytest.fixture(scope="module")
def model_and_params():
    return make_model(**SHAPE)


@functools.cache
def generated(strategy):
    model, params = make_model(**SHAPE)
    config = EngineConfig(slots=3, capacity=64, chunk=64, cache=strategy, unroll=False)
    engine = Engine(model, params, config=config)
    tickets = [engine.submit(request) for request in REQUESTS]
    while engine.step():
        pass
    return [ticket.result() for ticket in tickets]


def batch_of(results):
    return Rollouts.of(results, loops=LOOPS, longest=LONGEST)


@pytest.mark.parametrize("strategy", CacheStrategy)
def test_replay_gives_the_log_probabilities_of_generation(model_and_params, strategy):
    results = generated(strategy)
    assert len({loop for result in results for loop in result.exit_loops}) == LOOPS
    log_probs = replay_log_probs(*model_and_params, batch_of(results), strategy=strategy, loops=LOOPS)
    for row, result in zip(np.asarray(log_probs), results):
        np.testing.assert_allclose(row[: len(result.tokens)], result.log_probs, atol=1e-4)
        assert not row[len(result.tokens) :].any()


def test_replay_of_one_result(model_and_params):
    result = generated(CacheStrategy.FULL)[2]
    np.testing.assert_allclose(replay(*model_and_params, result), result.log_probs, atol=1e-4)


def test_another_cache_gives_other_log_probabilities(model_and_params):
    results = generated(CacheStrategy.LAST)
    log_probs = replay_log_probs(*model_and_params, batch_of(results), strategy=CacheStrategy.FULL, loops=LOOPS)
    assert np.abs(np.asarray(log_probs)[0, :7] - results[0].log_probs).max() > 1e-2
