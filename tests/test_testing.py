"""The helpers that the package ships for tests of other programs."""

import jax
import numpy as np
import pytest

from looplm_jax.data.tokenizers import check_vocab, deserialize
from looplm_jax.testing import assert_resumes_exactly, tiny_config, tiny_model, tiny_tokenizer


class Numbers:
    """A stream of the whole numbers. `lost` of its state is lost when it is restored."""

    def __init__(self, lost=0):
        self._next, self._lost = 0, lost

    def __next__(self):
        self._next += 1
        return {"tokens": np.full(3, self._next)}

    def state(self):
        return {"next": self._next}

    def restore(self, state):
        self._next = state["next"] - self._lost


def test_a_stream_that_resumes_passes():
    assert_resumes_exactly(Numbers, done=3, more=4)


def test_a_stream_that_resumes_elsewhere_fails():
    with pytest.raises(AssertionError):
        assert_resumes_exactly(lambda: Numbers(lost=1), done=3, more=4)


def test_a_stream_that_ignores_its_state_fails():
    class Forgetful(Numbers):
        def restore(self, state):
            pass

    with pytest.raises(AssertionError):
        assert_resumes_exactly(Forgetful, done=3, more=4)


def test_model_and_tokenizer_fit():
    tokenizer = tiny_tokenizer()
    assert tokenizer.vocab_size == tiny_config().vocab_size
    check_vocab(tokenizer, tiny_config().vocab_size)
    assert tokenizer.decode(tokenizer.encode("a b 7")) == "a b 7"
    assert deserialize(tokenizer.kind, tokenizer.serialize()).fingerprint == tokenizer.fingerprint


def test_a_tiny_model_has_the_given_configuration():
    model, _ = tiny_model(tiny_config(width=8, num_heads=2))
    assert model.config.width == 8
    first, same, other = (jax.tree.leaves(tiny_model(model.config, seed=seed)[1]) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
