"""Eq. 4 as the training loss."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from golden_torch import random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.convert.torch_model.modeling_looplm import expected_loss

pytestmark = [
    pytest.mark.transformers,
    # The name in 4.57; version 5 also has another name for it.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


def naive_eq4(token_losses, gate_logits, beta):
    """Computes Eq. 4 for one token in Python floats, from losses and gate logits of T loops."""
    survival, total = 1.0, 0.0
    for loop, (loss, gate) in enumerate(zip(token_losses.tolist(), gate_logits.tolist(), strict=True), start=1):
        leaves = 1.0 if loop == len(gate_logits) else torch.tensor(gate, dtype=torch.float64).sigmoid().item()
        p = survival * leaves
        total += p * loss + (beta * p * torch.tensor(p, dtype=torch.float64).log().item() if p > 0 else 0.0)
        survival *= 1 - leaves
    return total


numbers = st.floats(-8, 8)


@given(pairs=st.lists(st.tuples(st.floats(0, 10), numbers), min_size=1, max_size=6), beta=st.floats(0, 1))
def test_loss_of_a_token_is_the_printed_formula(pairs, beta):
    losses, gates = (torch.tensor(column) for column in zip(*pairs, strict=True))
    ours = expected_loss(losses, gates, beta).item()
    assert ours == pytest.approx(naive_eq4(losses, gates, beta), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("gate", [-1e4, -100.0, 100.0, 1e4])
def test_saturated_gates_have_finite_losses_and_gradients(gate):
    gates = torch.full((3, 4), gate, requires_grad=True)
    losses = torch.rand(3, 4, requires_grad=True)
    loss = expected_loss(losses, gates, 0.05).sum()
    loss.backward()
    assert loss.isfinite()
    assert gates.grad.isfinite().all()
    assert losses.grad.isfinite().all()
    reached = losses[:, 0 if gate > 0 else -1].sum()
    torch.testing.assert_close(loss, reached)


@pytest.fixture
def model():
    return tiny_model(spread=0.3)


def labels_with_holes(ids):
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, 4] = -100
    return labels


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_loss_is_the_mean_over_targets_that_count(model, loops):
    ids = random_ids(2, 7)
    labels = labels_with_holes(ids)
    output = model(ids, labels=labels, loops=loops, entropy_weight=0.3, output_hidden_states=True)
    total, count = 0.0, 0
    for row in range(2):
        for column in range(6):
            target = labels[row, column + 1]
            if target == -100:
                continue
            states = torch.stack([h[row, column] for h in output.hidden_states])
            losses = -model.lm_head(states).log_softmax(-1)[:, target]
            total += naive_eq4(losses, output.gate_logits[row, column], 0.3)
            count += 1
    assert output.loss.item() == pytest.approx(total / count, rel=1e-4)
    by_items = model(ids, labels=labels, loops=loops, entropy_weight=0.3, num_items_in_batch=torch.tensor(20))
    assert by_items.loss.item() == pytest.approx(total / 20, rel=1e-4)


def test_entropy_weight_is_that_of_the_configuration_by_default(model):
    ids = random_ids(2, 5)
    model.config.entropy_weight = 0.7
    assert model(ids, labels=ids).loss == model(ids, labels=ids, entropy_weight=0.7).loss
    assert model(ids, labels=ids).loss != model(ids, labels=ids, entropy_weight=0.0).loss


def test_labels_change_no_logits_and_make_no_cache(model):
    ids = random_ids(2, 5)
    with_labels = model(ids, labels=ids, exit_threshold=0.5, logits_to_keep=1)
    torch.testing.assert_close(with_labels.logits, model(ids, exit_threshold=0.5, use_cache=False).logits[:, -1:])
    assert with_labels.loops_run == 4
    assert with_labels.past_key_values is None
    assert with_labels.hidden_states is None
    assert model(ids, labels=ids, use_cache=True).past_key_values is not None


def test_no_target_at_all_is_no_loss(model):
    ids = random_ids(1, 4)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_row_of_one_token_has_no_target(model):
    assert model(random_ids(1, 1), labels=random_ids(1, 1)).loss == 0


def gradients(model, ids, mask):
    model.train()
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(model, use_reentrant):
    ids, mask = random_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    plain = gradients(model, ids, mask)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    passes = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for name, gradient in gradients(model, ids, mask).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-6)
    assert len(passes) == 2 * 4  # each loop once forward and once recomputed
    cache = tiny_model()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"^gradient checkpointing cannot append to past_key_values; leave"):
        model(ids[:, :1], past_key_values=cache)


def test_every_parameter_learns_also_at_one_loop(model):
    for loops in (1, 4):
        model.zero_grad()
        ids = random_ids(2, 6)
        model(ids, labels=ids, loops=loops).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_gates_and_loss_are_float32_in_a_bfloat16_model(model):
    ids = random_ids(2, 6)
    exact = model(ids, labels=ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(ids, labels=ids)
    rounded = model.to(torch.bfloat16)(ids, labels=ids)
    for output in (cast, rounded):
        assert output.gate_logits.dtype == output.exit_probabilities.dtype == output.loss.dtype == torch.float32
        assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.05)
    rounded.loss.backward()
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, do_sample=False)
    assert made.shape == (2, 10)
