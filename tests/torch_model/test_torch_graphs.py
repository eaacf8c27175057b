"""Graphs of the model: compiled and traced, it computes at any length what it computes when called."""

import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import torch
from golden_torch import random_ids, tiny_model
from transformers.quantizers.base import HfQuantizer

pytestmark = pytest.mark.transformers

LENGTHS = (7, 11)


@pytest.fixture(scope="module")
def model():
    return tiny_model(spread=0.3, num_hidden_layers=1, total_ut_steps=2).requires_grad_(False)


@pytest.fixture
def compiled(model):
    torch._dynamo.reset()
    yield torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()


def padded(ids):
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


@pytest.mark.parametrize(
    "settings", [{}, {"use_cache": False, "exit_threshold": 0.5}, {"output_hidden_states": True}], ids=str
)
def test_one_whole_graph_at_two_lengths(model, compiled, settings):
    for length in LENGTHS:
        ids = random_ids(2, length)
        torch.testing.assert_close(compiled(ids, **settings).logits, model(ids, **settings).logits)


def test_a_graph_of_padded_prompts(model, compiled):
    for length in LENGTHS:
        ids = random_ids(2, length)
        mask = padded(ids)
        ours, theirs = (call(ids, attention_mask=mask).logits[mask.bool()] for call in (compiled, model))
        torch.testing.assert_close(ours, theirs)


def test_quantizers_leave_the_gate_and_the_head_alone(model):
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert {"early_exit_gate", "lm_head"} <= set(skipped)
