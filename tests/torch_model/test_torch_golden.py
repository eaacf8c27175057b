"""Equal to the official PyTorch code, to 1e-4 in float32."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from golden_torch import golden, golden_model

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def model():
    return golden_model()


@pytest.fixture(scope="module")
def run(model):
    with torch.no_grad():
        return model(golden()["ids"], output_hidden_states=True)


def assert_golden(ours, name, chosen=...):
    torch.testing.assert_close(ours[chosen], golden()[name][chosen], rtol=0, atol=1e-4)


def test_state_dict_has_the_published_names(model):
    assert set(model.state_dict()) == {name[2:] for name in golden() if name.startswith("w/")}


def test_states_gates_and_exit_distribution_of_every_loop(run):
    assert_golden(torch.stack(run.hidden_states), "hidden_steps")
    assert_golden(run.gate_logits, "gate_logits")
    assert_golden(run.exit_probabilities, "exit_pdf")


def test_keys_and_values_of_every_loop_and_layer(run):
    assert_golden(torch.stack([layer.keys for layer in run.past_key_values.layers]), "cache_k")
    assert_golden(torch.stack([layer.values for layer in run.past_key_values.layers]), "cache_v")


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("loop", [1, 2, 3, 4])
def test_logits_of_every_loop(model, loop, use_cache):
    with torch.no_grad():
        output = model(golden()["ids"], exit_loop=loop, use_cache=use_cache)
    assert_golden(output.logits, f"logits_step{loop - 1}")
    assert (output.exit_loops == loop).all()


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_logits_at_the_exit_of_each_threshold(model, threshold):
    with torch.no_grad():
        as_argument = model(golden()["ids"], exit_threshold=threshold, use_cache=False)
        as_configured = golden_model(early_exit_threshold=threshold)(golden()["ids"])
    assert_golden(as_argument.logits, f"logits_thr{threshold}")
    assert_golden(as_configured.logits, f"logits_thr{threshold}")


def test_left_padded_row(model):
    with torch.no_grad():
        output = model(golden()["ids"], attention_mask=golden()["attn_mask"])
    assert_golden(output.logits, "logits_padded", golden()["attn_mask"].bool())
    assert output.logits.isfinite().all()


@pytest.mark.parametrize(("mask", "name"), [("ones", "gen_greedy"), ("attn_mask", "gen_greedy_padded")])
def test_greedy_generation(model, mask, name):
    ids, expected = golden()["ids"], golden()[name]
    mask = torch.ones_like(ids) if mask == "ones" else golden()[mask]
    count = expected.shape[1] - ids.shape[1]
    made = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(made, expected)
