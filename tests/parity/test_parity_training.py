"""Gradients of Eq. 4 and one AdamW step agree between JAX and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from twins import CASES, torch_twin, twins

from looplm_jax.convert._layout import flat_arrays
from looplm_jax.convert._state_dict import from_torch_state_dict
from looplm_jax.losses import stage1, token_losses
from looplm_jax.models._looplm import head_matrix

pytestmark = pytest.mark.transformers
BETA = 0.1


def batch(pair):
    """Returns tokens, and labels of which some are masked."""
    ids = pair.tokens(2, 12)
    labels = ids.copy()
    labels[0, :4] = -100
    return ids, labels


def our_loss(pair, ids, labels):
    def loss(params):
        output = pair.model.apply({"params": params}, jnp.asarray(ids, jnp.int32))
        mask = jnp.asarray(labels[:, 1:] != -100, jnp.float32)
        targets = jnp.where(mask > 0, jnp.asarray(labels[:, 1:], jnp.int32), 0)
        per_loop = token_losses(output.hidden[:, :, :-1], head_matrix(params, pair.config), targets)
        return stage1(per_loop, output.gate_logits[:, :, :-1], beta=BETA, mask=mask)[0]

    return loss


@functools.cache
def our_value_and_gradients(case):
    pair = twins(case)
    return jax.jit(jax.value_and_grad(our_loss(pair, *batch(pair))))(pair.params)


@pytest.mark.parametrize(
    "case",
    [case if case.endswith(("T1", "T4_tied")) else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_loss_and_gradients_of_eq_4(case):
    pair = twins(case)
    ids, labels = batch(pair)
    value, gradients = our_value_and_gradients(case)
    twin = torch_twin(pair.config, pair.params)
    output = twin(torch.tensor(ids), labels=torch.tensor(labels), entropy_weight=BETA)
    output.loss.backward()
    np.testing.assert_allclose(value, output.loss.item(), rtol=1e-5)
    named = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in twin.named_parameters()}
    theirs = from_torch_state_dict(named, pair.config)
    for (path, mine), other in zip(flat_arrays(gradients).items(), flat_arrays(theirs).values(), strict=True):
        scale = max(float(jnp.abs(other).max()), 1e-6)
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-3 * scale, err_msg=".".join(path))


@pytest.mark.parametrize("case", ["multi_head_T4_tied", "grouped_T4"])
def test_one_step_of_adamw(case):
    pair = twins(case)
    ids, labels = batch(pair)
    rate, decay = 1e-3, 0.1
    optimizer = optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-8, weight_decay=decay)

    @jax.jit
    def step(params, gradients):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    ours = step(pair.params, our_value_and_gradients(case)[1])
    twin = torch_twin(pair.config, pair.params)
    adamw = torch.optim.AdamW(twin.parameters(), lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    twin(torch.tensor(ids), labels=torch.tensor(labels), entropy_weight=BETA).loss.backward()
    adamw.step()
    theirs = from_torch_state_dict(dict(twin.named_parameters()), pair.config)
    for (path, mine), other in zip(flat_arrays(ours).items(), flat_arrays(theirs).values(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5, err_msg=".".join(path))
