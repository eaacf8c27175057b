"""Graphs of the model: compiled and traced, it computes the same as in eager mode, at any length."""

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
    return tiny_model(spread=0.3, hidden_size=16, num_hidden_layers=1, total_ut_steps=2).requires_grad_(False)


@pytest.fixture(autouse=True)
def no_graph_of_another_test():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, backend="eager", **options)


def padded(ids, generated=0):
    mask = torch.ones(ids.shape[0], ids.shape[1] + generated, dtype=torch.long)
    mask[0, :3] = 0
    return mask


def test_one_whole_graph_of_prompts(model):
    graph = compiled(model)
    for length in LENGTHS:
        ids = random_ids(2, length)
        torch.testing.assert_close(graph(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"exit_threshold": 0.5, "use_cache": False},
        pytest.param({"output_hidden_states": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_one_whole_graph_of_padded_prompts(model, settings):
    graph = compiled(model, dynamic=True)
    for length in LENGTHS:
        ids = random_ids(2, length)
        mask = padded(ids)
        ours, theirs = (call(ids, attention_mask=mask, **settings).logits[mask.bool()] for call in (graph, model))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_one_whole_graph_of_decoding(model):
    graph = compiled(model)
    for length in LENGTHS:
        ours, theirs = caches(model, random_ids(2, length))
        for step in range(3):
            token = random_ids(2, 1, seed=step)
            made = graph(token, past_key_values=ours).logits
            torch.testing.assert_close(made, model(token, past_key_values=theirs).logits)
        assert_same_cache(ours, theirs)


def test_one_whole_graph_of_padded_decoding_with_exits(model):
    graph = compiled(model, dynamic=True)
    for length in LENGTHS:
        ids = random_ids(2, length)
        ours, theirs = caches(model, ids, attention_mask=padded(ids))
        for step in range(2):
            token, mask = random_ids(2, 1, seed=step), padded(ids, generated=step + 1)
            made = graph(token, attention_mask=mask, past_key_values=ours, exit_threshold=0.5)
            called = model(token, attention_mask=mask, past_key_values=theirs, exit_threshold=0.5)
            torch.testing.assert_close(made.logits, called.logits)
            torch.testing.assert_close(made.exit_loops, called.exit_loops)
        assert_same_cache(ours, theirs)


def caches(model, ids, **settings):
    return tuple(model(ids, use_cache=True, **settings).past_key_values for _ in range(2))


def assert_same_cache(ours, theirs):
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        torch.testing.assert_close(our_layer.keys, their_layer.keys)
        torch.testing.assert_close(our_layer.values, their_layer.values)


@pytest.mark.slow
def test_one_whole_graph_of_the_loss(model):
    graph = compiled(model, dynamic=True)
    for length in LENGTHS:
        ids = random_ids(2, length)
        torch.testing.assert_close(graph(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # raised by transformers
@pytest.mark.parametrize("length", LENGTHS)
def test_a_trace_of_other_ids(model, length):
    traced = torch.jit.trace(model, (random_ids(2, LENGTHS[0]),))
    ids = random_ids(3, length, seed=2)
    for made, called in zip(traced(ids), model(ids, use_cache=False, return_dict=False), strict=True):
        torch.testing.assert_close(made, called)


def test_quantizers_leave_the_gate_and_the_head_alone(model):
    skipped = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert {"early_exit_gate", "lm_head"} <= set(skipped)
