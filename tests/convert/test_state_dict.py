"""State dicts for plain PyTorch, without transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looplm_jax.config import (
    GatePlacement,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)
from looplm_jax.convert._state_dict import from_torch_state_dict, to_torch_state_dict
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM, init_params

torch = pytest.importorskip("torch")


def small(**changes):
    config = ModelConfig(
        **{"vocab_size": 13, "width": 8, "mlp_width": 12, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, **changes}
    )
    return config, init_params(LoopLM(config), jax.random.key(0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_there_and_back_is_bit_identical(tied, dtype):
    config, params = small(tied_head=tied)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    back = from_torch_state_dict(to_torch_state_dict(params, config), config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_tensors_are_copies_that_pytorch_may_change():
    config, params = small()
    state = to_torch_state_dict(params, config)
    state["model.norm.weight"].zero_()
    assert (params["norm"]["scale"] == 1).all()
    assert all(tensor.is_contiguous() for tensor in state.values())


def test_a_tied_head_is_one_tensor_under_both_names():
    config, params = small(tied_head=True)
    state = to_torch_state_dict(params, config)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]


def test_a_tied_head_that_differs_is_refused():
    config, params = small(tied_head=True)
    state = to_torch_state_dict(params, config)
    with pytest.raises(UserError, match=r"tensor lm_head.weight is not part of the model"):
        from_torch_state_dict({**state, "lm_head.weight": state["lm_head.weight"] + 1}, config)


def test_a_missing_tensor_is_named():
    config, params = small()
    state = to_torch_state_dict(params, config)
    del state["model.norm.weight"]
    with pytest.raises(UserError, match=r"state dict: tensor model.norm.weight is missing"):
        from_torch_state_dict(state, config)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"residual": Residual.PER_LOOP}, "residual=per_loop"),
        ({"embedding_scale": 2.0}, "embedding_scale=2.0"),
        ({"state_norm": StateNorm.READOUT}, "state_norm=readout"),
        ({"injection": Injection.ADD}, "injection=add"),
        ({"injection": Injection.ADD, "initial_state": InitialState.NOISE}, "injection=add"),
        ({"time_signal": TimeSignal.SINUSOID}, "time_signal=sinusoid"),
        ({"position_signal": PositionSignal.SINUSOID}, "position_signal=sinusoid"),
        ({"gate": GatePlacement.BEFORE}, "gate=before"),
        # The tensors of these two have the names and shapes of Ouro's, or of a Llama's.
        ({"norm_placement": NormPlacement.OUTER}, "norm_placement=outer"),
        ({"norm_placement": NormPlacement.POST}, "norm_placement=post"),
        ({"norm_placement": NormPlacement.PRE, "residual": Residual.PER_LOOP}, "residual=per_loop"),
    ],
)
def test_options_without_parameters_are_refused_by_name(options, shown):
    config, params = small()
    state, other = to_torch_state_dict(params, config), dataclasses.replace(config, **options)
    for convert in (lambda: to_torch_state_dict(params, other), lambda: from_torch_state_dict(state, other)):
        with pytest.raises(UserError) as error:
            convert()
        assert str(error.value) == f"Hugging Face's Ouro cannot express model.{shown}; keep our format"


def test_norms_before_the_branches_alone_are_those_of_a_llama():
    config, params = small(norm_placement=NormPlacement.PRE)
    back = from_torch_state_dict(to_torch_state_dict(params, config), config)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_without_pytorch(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    config, params = small()
    with pytest.raises(UserError, match=r"pip install 'looplm_jax\[torch\]'"):
        to_torch_state_dict(params, config)
