"""A source that becomes unreadable is retried a few times, and then the run gives up."""

import numpy as np
import pytest
from training_cases import random_batch

from looplm_jax.errors import UserError
from looplm_jax.training._batches import RetryingReader


class Stream:
    """A stream whose n-th batch is drawn from seed n. Reading fails while `world` says so."""

    def __init__(self, world):
        self.world, self.at = world, 0
        world["opened"] = world.get("opened", 0) + 1

    def __next__(self):
        if self.world.get("failures", 0) > 0:
            self.world["failures"] -= 1
            self.at += 7  # after a failure, the position of a stream is undefined
            raise UserError("a.jsonl: there is no such file")
        self.at += 1
        return random_batch(self.at)

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]

    def close(self):
        pass


@pytest.fixture
def opened():
    world, said = {}, []
    return RetryingReader(lambda: Stream(world), said.append, waits=(0.0, 0.0)), world, said


def assert_batch(batch, seed):
    np.testing.assert_array_equal(batch.tokens, random_batch(seed).tokens)


def test_the_state_is_that_of_the_batch_taken_last(opened):
    reader, _, _ = opened
    assert reader.read_ahead() is None
    assert reader.state() == {"at": 0}
    assert_batch(reader.next(), 1)
    assert reader.state() == {"at": 1}


def test_a_source_that_comes_back_leaves_no_trace(opened):
    reader, world, said = opened
    for seed in (1, 2, 3):
        world["failures"] = 2 if seed == 2 else 0
        assert reader.read_ahead() is None
        assert_batch(reader.next(), seed)
    assert said == ["warning: a.jsonl: there is no such file; trying again in 0 s"] * 2
    assert world["opened"] == 3


def test_a_source_that_stays_away_is_given_up(opened):
    reader, world, _ = opened
    world["failures"] = 3
    assert reader.read_ahead() == "a.jsonl: there is no such file"
    assert reader.state() == {"at": 0}
