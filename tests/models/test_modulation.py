"""Layers that are modulated by time: the published module, passes with given steps, and initial parameters."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BASE, random_tokens, tiny_model

from looplm_jax.config import TimeSignal
from looplm_jax.models import LoopLM, LoopTime, init_params, last_loop
from looplm_jax.models._modulation import Modulation, TimeEmbedding

_LOOPFORMER = Path(__file__).parent.parent / "data" / "loopformer.npz"
WIDTH, LENGTH, HEADS = 16, 7, 2


def loopformer():
    """Returns weights of LoopFormer's published model in float64, tokens, and its final states after some steps."""
    with np.load(_LOOPFORMER) as arrays:
        return dict(arrays)


# The published module


def weights_of(golden, name):
    return golden[f"w/{name}.weight"].T, golden.get(f"w/{name}.bias")


def affine(golden, name):
    """Returns published weights as parameters of ours."""
    matrix, bias = weights_of(golden, name)
    return {"time_map": jnp.asarray(matrix, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


@jax.jit
def modulations(embedding, layers, time):
    """Returns the gates and scales of each layer by our modules."""
    embedded = TimeEmbedding(WIDTH, jax.nn.initializers.zeros).apply({"params": embedding}, time)
    return [Modulation().apply({"params": {"layer": layer}}, embedded) for layer in layers]


def normal(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.finfo(float).eps)


def attention(golden, block, x):
    def heads(part):
        return part.reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)

    query, key, value = map(heads, np.split(x @ weights_of(golden, f"{block}.attn.c_attn")[0], 3, axis=-1))
    scores = query @ key.transpose(0, 1, 3, 2) / math.sqrt(WIDTH // HEADS)
    weights = np.exp(np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -np.inf))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ value
    return mixed.transpose(0, 2, 1, 3).reshape(x.shape) @ weights_of(golden, f"{block}.attn.c_proj")[0]


def feed_forward(golden, block, x):
    y = x @ weights_of(golden, f"{block}.mlp.c_fc")[0]
    return 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) @ weights_of(golden, f"{block}.mlp.c_proj")[0]


@pytest.mark.parametrize("name", ["uniform8", "short3", "one"])
def test_times_modulate_as_in_the_published_model(name):
    golden = loopformer()
    blocks = [f"transformer.h.blocks.{layer}" for layer in range(2)]
    sides = {"start": "time_embedder", "step": "dt_embedder"}
    embedding = {
        f"{ours}_{end}": affine(golden, f"{theirs}.mlp.{index}")
        for ours, theirs in sides.items()
        for end, index in (("in", 0), ("out", 2))
    }
    layers = [affine(golden, f"{block}.adaLN_modulation.1") for block in blocks]

    steps = jnp.asarray(golden[f"{name}/steps"], jnp.float32)
    x = golden["w/transformer.wte.weight"][golden["tokens"]] + golden["w/transformer.wpe.weight"][:LENGTH]
    for done in range(len(steps)):
        time = LoopTime.of_steps(jnp.asarray(done), steps)
        for block, of_layer in zip(blocks, modulations(embedding, layers, time), strict=True):
            own = of_layer._replace(**{name: np.asarray(value) for name, value in of_layer._asdict().items()})
            x = x + own.attention_gate * attention(golden, block, (1 + own.attention_scale) * normal(x))
            x = x + own.mlp_gate * feed_forward(golden, block, (1 + own.mlp_scale) * normal(x))
    np.testing.assert_allclose(
        normal(x) * golden["w/transformer.norm_f.weight"], golden[f"{name}/hidden"], rtol=1e-5, atol=1e-5
    )


# Passes


@pytest.mark.slow
def test_the_last_loop_has_the_time_of_each_sequence_or_that_of_given_steps():
    """A pass with fewer loops has larger steps: equal ones by default, or given ones."""
    model, params = tiny_model("loopformer")
    tokens = random_tokens()[:2]
    steps = jnp.array([0.5, 0.125, 0.375])

    @jax.jit
    def ours(depths, steps):
        return last_loop(model, {"params": params}, tokens, depths, most=3, steps=steps).hidden

    @jax.jit
    def written_out(starts, steps):
        variables = {"params": params}
        context, embedded, _ = model.apply(variables, tokens, method="begin")
        state = model.apply(variables, embedded, method="initial_state")
        for done in range(2):
            time = LoopTime(start=starts[done], step=steps[done])
            output, _, _ = model.apply(variables, state, embedded, context, done, time=time, method="loop_step")
            state = output.state
        return output.hidden

    np.testing.assert_allclose(
        ours(jnp.array([2, 2]), steps), written_out(jnp.array([0.0, 0.5]), steps), rtol=1e-4, atol=1e-5
    )
    halves = written_out(jnp.array([0.0, 0.5]), jnp.array([0.5, 0.5]))
    found = ours(jnp.array([2, 3]), None)
    np.testing.assert_allclose(found[0], halves[0], rtol=1e-4, atol=1e-5)

    forward = jax.jit(lambda loops: model.apply({"params": params}, tokens, loops=loops).hidden[-1], static_argnums=0)
    np.testing.assert_allclose(found[1], forward(3)[1], rtol=1e-4, atol=1e-5)
    assert np.abs(found[1] - forward(2)[1]).max() > 1e-3


# Initial parameters


def test_initial_layers_return_their_input():
    config = dataclasses.replace(BASE, time_signal=TimeSignal.MODULATION)
    model = LoopLM(config)
    params, tokens = init_params(model, jax.random.key(1)), random_tokens()
    hidden = jax.jit(lambda params: model.apply({"params": params}, tokens).hidden)(params)

    embedded = np.asarray(params["embedding"])[np.asarray(tokens)]
    wanted = embedded / np.sqrt(np.mean(embedded**2, axis=-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(hidden[0], wanted, rtol=1e-5, atol=1e-6)
    modulation = params["core"]["layers"]["modulation"]["layer"]
    assert modulation["time_map"].shape == (config.num_layers, config.width, 4 * config.width)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(modulation))
    assert all(np.any(half["time_map"]) for half in params["time_embedding"].values())
