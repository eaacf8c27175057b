"""Bits per parameter: the formula at its limits, and the losses against a sum by hand."""

import math

import jax
import numpy as np
import pytest

from looplm_jax.config import ModelConfig
from looplm_jax.data.tasks import Capo
from looplm_jax.data.tasks._capo import Kind
from looplm_jax.data.tasks._capo_text import FACTS, NAMES
from looplm_jax.errors import UserError
from looplm_jax.evaluation._synthetic_tasks import (
    KnowledgeLoss,
    bits_per_parameter,
    knowledge_loss,
    most_bits_per_parameter,
)
from looplm_jax.models._looplm import LoopLM, head_matrix, init_params

TASK = Capo(people=7, validation_draws=2)
SYMBOLS = TASK.tokenizer.vocab_size
MODEL = LoopLM(
    ModelConfig(
        vocab_size=SYMBOLS, width=16, mlp_width=32, num_layers=1, num_heads=2, loops=2, tied_head=True, init_std=0.3
    )
)


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL, jax.random.key(0))


def losses(name, value):
    return KnowledgeLoss(name=np.array([name]), value=np.array([value]))


def test_who_knows_all_holds_r_max_and_who_guesses_holds_nothing():
    everything = bits_per_parameter(losses(math.log(500), 0.0), people=500, parameters=10_000)
    assert everything == pytest.approx(most_bits_per_parameter(500, 10_000))
    nothing = bits_per_parameter(losses(math.log(NAMES), math.log(FACTS)), people=500, parameters=10_000)
    assert nothing == pytest.approx(0.0, abs=1e-12)


def test_r_max_is_that_of_the_paper():
    bits = 20_000 * (math.log2(1.6e8 / 20_000) + 47.59162)
    assert most_bits_per_parameter(20_000, 1_000_000) == pytest.approx(bits / 1e6, rel=1e-6)


def test_a_uniform_model_pays_the_logarithm_of_the_vocabulary_for_each_token(params):
    zeros = jax.tree.map(np.zeros_like, params)
    loss = knowledge_loss(MODEL, zeros, TASK, loops=3, batch_size=4)
    assert loss.name == pytest.approx([6 * math.log(SYMBOLS)] * 3, rel=1e-5)
    assert loss.value == pytest.approx([14 * math.log(SYMBOLS)] * 3, rel=1e-5)


@jax.jit
def log_probabilities(params, tokens):
    output = MODEL.apply({"params": params}, tokens, loops=3)
    return jax.nn.log_softmax(output.hidden[:, 0] @ head_matrix(params, MODEL.config))


def test_losses_are_those_of_each_biography_by_itself(params):
    name, value = np.zeros(3), np.zeros(3)
    for index in range(TASK.validation_items):
        biography = TASK.validation_biography(index)
        tokens = np.array(TASK.tokenizer.encode(" ".join(biography.symbols), special=True))
        padded = np.pad(tokens, (0, TASK.max_tokens - len(tokens)))[None].astype(np.int32)
        nats = -np.asarray(log_probabilities(params, padded))[:, np.arange(len(tokens) - 1), tokens[1:]]
        name += nats[:, biography.kinds[1:] == Kind.NAME].sum(axis=1) / TASK.validation_items
        value += nats[:, biography.kinds[1:] == Kind.VALUE].sum(axis=1) / TASK.validation_items
    loss = knowledge_loss(MODEL, params, TASK, loops=3, batch_size=4)  # the last batch is not full
    assert loss.name == pytest.approx(name, rel=1e-4)
    assert loss.value == pytest.approx(value, rel=1e-4)


def test_nothing_to_test_with_is_refused(params):
    with pytest.raises(UserError, match="the task has no held-out biographies; raise validation_draws"):
        knowledge_loss(MODEL, params, Capo(people=3, validation_draws=0), loops=1)
