"""The PyTorch twin that we compare our speed with computes the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looplm_jax.losses import stage1_from_hidden
from looplm_jax.models import presets
from looplm_jax.models._looplm import LoopLM, Params, head_matrix, init_params

torch = pytest.importorskip("torch", reason="the twin needs torch: `make torch` installs it")

CONFIG = dataclasses.replace(presets.tiny(), num_kv_heads=4)
LOOPS, BETA = 3, 0.1


def copy_into(twin, params: Params) -> None:
    """Copies our parameters into the twin's modules; torch stores matrices as [out, in]."""

    def put(parameter, value) -> None:
        parameter.data = torch.tensor(np.asarray(value).reshape(parameter.shape))

    put(twin.embedding.weight, params["embedding"])
    put(twin.head.weight, params["head"].T)
    put(twin.norm.weight, params["norm"]["scale"])
    put(twin.gate.weight, params["gate"]["kernel"])
    put(twin.gate.bias, params["gate"]["bias"])
    layers = params["core"]["layers"]
    norms = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
    for index, layer in enumerate(twin.layers):
        for name in ("query", "key", "value"):
            kernel = layers["attention"][name]["kernel"][index]
            put(getattr(layer, name).weight, kernel.reshape(CONFIG.width, -1).T)
        put(layer.out.weight, layers["attention"]["out"]["kernel"][index].reshape(-1, CONFIG.width).T)
        for name in ("gate", "up", "down"):
            put(getattr(layer, name).weight, layers["mlp"][name]["kernel"][index].T)
        for norm, name in zip(layer.norms, norms, strict=True):
            put(norm.weight, layers[name]["scale"][index])


@pytest.mark.slow
def test_the_twin_has_the_same_loss_and_gradients():
    from experiments.benchmarks.torch_twin import TorchLoopLM, stage1

    model = LoopLM(CONFIG)
    params = jax.tree.map(lambda leaf: 3 * leaf, init_params(model, jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12), dtype=np.int32)
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])

    def loss_of(params: Params):
        output = model.apply({"params": params}, inputs, loops=LOOPS)
        head = head_matrix(params, CONFIG)
        return stage1_from_hidden(output.hidden, head, targets, output.gate_logits, beta=BETA)[0]

    ours, gradients = jax.jit(jax.value_and_grad(loss_of))(params)
    twin = TorchLoopLM(CONFIG)
    copy_into(twin, params)
    theirs = stage1(twin, torch.tensor(tokens[:, :-1]).long(), torch.tensor(tokens[:, 1:]).long(), LOOPS, BETA)
    theirs.backward()
    np.testing.assert_allclose(float(ours), theirs.item(), rtol=1e-5)
    np.testing.assert_allclose(gradients["head"].T, twin.head.weight.grad.numpy(), rtol=1e-3, atol=3e-5)
    up = gradients["core"]["layers"]["mlp"]["up"]["kernel"][1].T
    np.testing.assert_allclose(up, twin.layers[1].up.weight.grad.numpy(), rtol=1e-3, atol=3e-5)
    np.testing.assert_allclose(gradients["gate"]["kernel"], twin.gate.weight.grad.numpy()[0], rtol=1e-3, atol=3e-5)
