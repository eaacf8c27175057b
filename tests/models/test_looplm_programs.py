"""Compiled programs: remat changes no result, one compilation serves all data, and no program grows with L or T."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    BASE,
    compiled_forward,
    one_segment,
    plain_positions,
    random_tokens,
    tiny_config,
    tiny_model,
)

from looplm_jax import losses
from looplm_jax.config import ComputeConfig, Dtype, Injection, Remat
from looplm_jax.errors import UserError
from looplm_jax.models import presets
from looplm_jax.models._looplm import LoopLM, boxed_params, count_params, head_matrix, init_params


def loss_of(model, params, tokens, loops):
    output = model.apply({"params": params}, tokens[:, :-1], loops=loops)
    head = head_matrix(params, model.config)
    return losses.stage1_from_hidden(output.hidden, head, tokens[:, 1:], output.gate_logits, beta=0.1)[0]


@functools.cache
def loss_and_gradients(remat: Remat):
    model, params = tiny_model("grouped_tied", ComputeConfig(remat=remat))
    return jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, random_tokens(), BASE.loops)))(params)


@pytest.mark.parametrize(
    "remat", [*(pytest.param(each, marks=pytest.mark.slow) for each in (Remat.DOTS, Remat.LAYER)), Remat.LOOP]
)
def test_remat_changes_neither_loss_nor_gradients(remat):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, loss_and_gradients(Remat.NONE), loss_and_gradients(remat))


def test_every_parameter_has_a_gradient():
    for path, gradient in jax.tree_util.tree_leaves_with_path(loss_and_gradients(Remat.NONE)[1]):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


def test_one_compilation_serves_all_data_of_a_shape():
    model, params = tiny_model("ouro")

    @jax.jit
    @chex.assert_max_traces(n=1)
    def forward(params, tokens, positions, segment_ids):
        return model.apply({"params": params}, tokens, positions=positions, segment_ids=segment_ids).gate_logits

    for seed in range(3):
        tokens = random_tokens(seed)
        forward(jax.tree.map(lambda leaf, seed=seed: leaf + seed, params), tokens, tokens % 7, tokens % 2)


IN_SHORT = {Remat.LAYER}


@pytest.mark.parametrize(
    ("option", "remat"),
    [
        *(pytest.param("ouro", remat, marks=[] if remat in IN_SHORT else pytest.mark.slow) for remat in Remat),
        ("prelude_linear_coda", Remat.LAYER),
    ],
)
def test_program_does_not_grow_with_layers_or_loops(option, remat):
    def lines(layers, loops):
        config = dataclasses.replace(tiny_config(option), num_layers=layers, loops=loops)
        model = LoopLM(config, ComputeConfig(remat=remat))
        params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
        step = jax.jit(jax.value_and_grad(lambda p, tokens: loss_of(model, p, tokens, loops)))
        return step.lower(params, jax.ShapeDtypeStruct((2, 7), jnp.int32)).as_text().count("\n")

    assert lines(layers=24, loops=8) == lines(layers=3, loops=4)


def test_bfloat16_compute_keeps_float32_parameters_gradients_and_gates():
    model, params = tiny_model("ouro", ComputeConfig(dtype=Dtype.BFLOAT16))
    made = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype("float32")}

    gradients = jax.eval_shape(jax.grad(lambda p: loss_of(model, p, random_tokens(), 2)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}

    ours = jax.jit(lambda: model.apply({"params": params}, random_tokens(), loops=1))()
    wide = compiled_forward("ouro")(random_tokens(), plain_positions(), one_segment())
    assert (ours.hidden.dtype, ours.gate_logits.dtype) == (jnp.bfloat16, jnp.float32)
    error = np.asarray(ours.hidden[0], np.float32) - np.asarray(wide.hidden[0])
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(np.asarray(wide.hidden[0]) ** 2))


def test_cpu_computes_in_float32_by_default():
    output = compiled_forward("ouro")(random_tokens(), plain_positions(), one_segment())
    assert output.hidden.dtype == jnp.float32


@pytest.mark.parametrize(
    ("config", "count"), [(presets.ouro_1_4b(), 1_434_652_673), (presets.ouro_2_6b(), 2_667_974_657)]
)
def test_released_models_have_their_exact_number_of_parameters(config, count):
    assert count_params(config) == count


@pytest.mark.parametrize(
    "preset",
    [
        presets.small,
        presets.tiny,
        presets.universal_transformer,
        presets.deq,
        presets.parcae,
        presets.loopformer,
    ],
)
def test_small_presets_take_a_vocabulary(preset):
    assert count_params(preset(50)) == count_params(preset(51)) - 2 * preset().width


def test_initialisation_is_normal_with_ones_for_norms_and_zero_for_the_gate_bias():
    config = dataclasses.replace(presets.tiny(vocab_size=499), injection=Injection.LINEAR)
    made = jax.jit(init_params, static_argnums=0)(LoopLM(config, ComputeConfig(remat=Remat.LOOP)), jax.random.key(3))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made))
    params = jax.device_get(made)
    np.testing.assert_array_equal(params.pop("injection"), np.concatenate([np.eye(32), np.eye(32)]))  # h + e initially
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            assert (leaf == 1).all(), name
        elif "bias" in name:
            assert leaf == 0, name
        else:
            assert abs(float(leaf.std()) - 0.02) < 0.02 * 4 / np.sqrt(2 * leaf.size), name
            assert abs(float(leaf.mean())) < 0.02 * 4 / np.sqrt(leaf.size), name


def test_every_parameter_names_its_axes():
    config = tiny_config("prelude_linear_coda")
    boxed = jax.eval_shape(lambda: boxed_params(LoopLM(config), jax.random.key(0)))
    assert boxed["core"]["layers"]["attention"]["query"]["kernel"].names == ("layers", "embed", "heads", "head_dim")
    assert boxed["embedding"].names == ("vocab", "embed")
    for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: hasattr(x, "names")):
        assert len(box.names) == box.value.ndim, path


@pytest.mark.parametrize(
    ("shape", "loops", "message"),
    [
        ((1, 33), 1, "33 tokens are beyond model.max_positions=32"),
        ((1, 4), 0, "loops must be at least 1, not 0"),
        ((1, 4), -2, "loops must be at least 1, not -2"),
    ],
)
def test_impossible_calls_are_refused_in_one_line(shape, loops, message):
    model, params = tiny_model("ouro")
    with pytest.raises(UserError) as error:
        model.apply({"params": params}, jnp.zeros(shape, jnp.int32), loops=loops)
    assert str(error.value) == message
