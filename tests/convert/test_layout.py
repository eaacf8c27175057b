import functools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import Injection, ModelConfig, NormPlacement
from looplm_jax.convert._layout import array_shapes, check_tensor_names, flat_arrays, torch_layout, unflat_arrays
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import count_params
from looplm_jax.models.presets import ouro_1_4b


def config(**changes):
    return ModelConfig(
        **{"vocab_size": 11, "width": 12, "mlp_width": 10, "num_layers": 2, "num_heads": 4, "head_dim": 6, **changes}
    )


@st.composite
def configs(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    placement = draw(st.sampled_from(NormPlacement))
    return config(
        num_kv_heads=kv_heads,
        num_layers=draw(st.integers(1, 3)),
        tied_head=draw(st.booleans()),
        norm_placement=placement,
    )


shapes_of = functools.cache(array_shapes)  # the generated inputs repeat


@given(configs())
def test_every_parameter_is_exactly_one_tensor(model):
    layout = list(torch_layout(shapes_of(model)))
    assert sum(np.prod(tensor.shape, dtype=int) for tensor in layout) == count_params(model)
    assert len({tensor.name for tensor in layout}) == len(layout)
    assert len({(tensor.path, tensor.layer) for tensor in layout}) == len(layout)


@given(configs())
def test_to_ours_undoes_to_torch(model):
    for tensor in torch_layout(shapes_of(model)):
        ours = np.arange(np.prod(tensor.our_shape, dtype=int)).reshape(tensor.our_shape)
        theirs = tensor.to_torch(ours)
        assert theirs.shape == tensor.shape
        np.testing.assert_array_equal(tensor.to_ours(theirs), ours)


def test_a_product_is_the_same_in_both_layouts():
    model = config(num_kv_heads=2)
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), array_shapes(model))
    x, heads = np.ones((3, 12), np.float32), np.ones((3, 4, 6), np.float32)
    for tensor in torch_layout(params):
        ours = np.asarray(flat_arrays(params)[tensor.path])
        ours = ours if tensor.layer is None else ours[tensor.layer]
        if "q_proj" in tensor.name:
            expected = np.tensordot(x, ours, axes=1).reshape(3, -1)
            np.testing.assert_allclose(x @ tensor.to_torch(ours).T, expected, rtol=1e-6, atol=1e-6)
        if "o_proj" in tensor.name:
            expected = np.tensordot(heads, ours, axes=2)
            np.testing.assert_allclose(heads.reshape(3, -1) @ tensor.to_torch(ours).T, expected, rtol=1e-6, atol=1e-6)


def test_names_and_shapes_of_the_released_weights():
    shapes = {tensor.name: tensor.shape for tensor in torch_layout(array_shapes(ouro_1_4b()))}
    assert len(shapes) == 24 * 11 + 5
    assert shapes["model.layers.23.mlp.down_proj.weight"] == (2048, 5632)
    assert shapes["model.early_exit_gate.weight"] == (1, 2048)
    assert shapes["model.early_exit_gate.bias"] == (1,)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (49152, 2048)


def test_flat_and_back():
    params = array_shapes(config())
    assert jax.tree.structure(unflat_arrays(flat_arrays(params))) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prelude_layers": 1}, "prelude"),
        ({"coda_layers": 1}, "coda"),
        ({"injection": Injection.LINEAR}, "injection"),
    ],
)
def test_a_part_without_a_place_is_refused_by_name(changes, part):
    with pytest.raises(UserError, match=f"parameters {part}.* have no place in a PyTorch Ouro model"):
        list(torch_layout(array_shapes(config(**changes))))


def test_every_tensor_is_accounted_for():
    wanted = {tensor.name: tensor for tensor in torch_layout(array_shapes(config()))}
    found = {name: tensor.shape for name, tensor in wanted.items()}
    check_tensor_names(found, wanted, "here")
    with pytest.raises(UserError, match=r"here: tensor lm_head.weight is missing"):
        check_tensor_names({name: shape for name, shape in found.items() if name != "lm_head.weight"}, wanted, "here")
    with pytest.raises(UserError, match=r"model.layers.0.mlp.gate_proj.bias is not part of the model; did you"):
        check_tensor_names({**found, "model.layers.0.mlp.gate_proj.bias": (10,)}, wanted, "here")
    with pytest.raises(UserError, match=r"model.norm.weight has shape \[13\], the model needs \[12\]"):
        check_tensor_names({**found, "model.norm.weight": (13,)}, wanted, "here")
