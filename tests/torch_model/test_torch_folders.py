"""Saving and loading: saved folders load anywhere with the same weights, and unsupported settings are refused."""

import json
import math
import pathlib
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from golden_torch import random_ids, tiny_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from looplm_jax.convert.torch_model import configuration_looplm, modeling_looplm
from looplm_jax.convert.torch_model.configuration_looplm import OuroConfig
from looplm_jax.convert.torch_model.modeling_looplm import OuroForCausalLM

pytestmark = pytest.mark.transformers


def auto_load(folder, kind=AutoModelForCausalLM, **settings):
    return kind.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def auto_load_with_report(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)


def assert_same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_logits(ours, theirs):
    ids = random_ids(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_folder_loads_with_its_own_copy_of_the_files(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "first")
    loaded, report = auto_load_with_report(tmp_path / "first")
    assert not any(report.values())
    assert type(loaded) is not OuroForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "first" / "model.safetensors")) != tied
    assert_same_weights(model, loaded)
    loaded.save_pretrained(tmp_path / "second")
    again = auto_load(tmp_path / "second")
    assert_same_weights(model, again)
    assert_same_logits(model, again)


def test_folder_written_by_hand_loads(tmp_path):
    """As the exporter writes it: published fields, weights and the two code files, nothing from transformers."""
    from safetensors.torch import save_file

    model = tiny_model()
    published = {
        "architectures": ["OuroForCausalLM"],
        "model_type": "ouro",
        "auto_map": {
            "AutoConfig": "configuration_looplm.OuroConfig",
            "AutoModel": "modeling_looplm.OuroModel",
            "AutoModelForCausalLM": "modeling_looplm.OuroForCausalLM",
        },
        "rope_scaling": None,
        "sliding_window": None,
        "max_window_layers": 2,
        "torch_dtype": "float32",
    }
    ours = {"entropy_weight", "dtype", "transformers_version"}
    published |= {name: value for name, value in model.config.to_diff_dict().items() if name not in ours}
    (tmp_path / "config.json").write_text(json.dumps(published))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for module in (configuration_looplm, modeling_looplm):
        shutil.copy(module.__file__, tmp_path)
    assert_same_logits(model, auto_load(tmp_path))
    assert isinstance(auto_load(tmp_path, AutoModel).norm, torch.nn.Module)
    assert AutoConfig.from_pretrained(tmp_path, trust_remote_code=True).max_window_layers == 2


def test_files_import_nothing_of_this_package():
    for module in (configuration_looplm, modeling_looplm):
        assert "looplm_jax" not in pathlib.Path(module.__file__).read_text()


def test_model_loads_in_bfloat16_and_generates(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = auto_load(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = random_ids(2, 4)
    made = loaded.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0, eos_token_id=None
    )
    assert made.shape == (2, 8)


def assert_initial(model, std):
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or "layernorm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            sigma = std / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - std) < 5 * sigma, name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_those_of_the_paper(tmp_path, tied):
    config = tiny_model(tie_word_embeddings=tied).config
    config.initializer_range = 0.05
    model = OuroForCausalLM(config)
    assert_initial(model, 0.05)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert_initial(AutoModelForCausalLM.from_config(config, trust_remote_code=True), 0.05)


def test_weights_that_a_folder_lacks_start_as_new_ones(tmp_path):
    model = tiny_model()
    kept = {name: value for name, value in model.state_dict().items() if "early_exit_gate" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded, report = auto_load_with_report(tmp_path)
    assert set(report["missing_keys"]) == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    assert (loaded.model.early_exit_gate.bias == 0).all()
    assert 0.05 < loaded.model.early_exit_gate.weight.std() < 0.2
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_layers_may_lie_on_disk(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    at_hand = ("model.embed_tokens", "model.norm", "model.early_exit_gate", "lm_head")
    places = {"model.layers": "disk", **dict.fromkeys(at_hand, "cpu")}
    assert_same_logits(model, auto_load(tmp_path, device_map=places, offload_folder=str(tmp_path / "offload")))


def test_embeddings_can_be_resized(tmp_path):
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        model.resize_token_embeddings(70, mean_resizing=False)
        assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)
        model.save_pretrained(tmp_path / str(tied))
        assert_same_weights(model, auto_load(tmp_path / str(tied)))


def test_tuple_and_dataclass_hold_the_same():
    model, ids = tiny_model(), random_ids(1, 4)
    with torch.no_grad():
        as_dict, as_tuple = model(ids, labels=ids), model(ids, labels=ids, return_dict=False)
    assert len(as_tuple) == len(as_dict)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(as_dict.to_tuple(), as_tuple, strict=True))


# --------------------------------------------------------------------------------------------------- configuration


def test_default_configuration_is_ouro_1_4b():
    config = OuroConfig()
    with torch.device("meta"):
        model = OuroForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_434_652_673


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    ],
)
def test_rope_theta_is_read_in_the_spelling_of_either_version(tmp_path, fields):
    config = OuroConfig(num_hidden_layers=1, **fields)
    assert config.rope_theta == 5e5
    config.save_pretrained(tmp_path)
    assert OuroConfig.from_pretrained(tmp_path).rope_theta == 5e5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("attention_bias", True),
        ("head_dim", 7),
        ("num_key_value_heads", 3),
        ("total_ut_steps", 0),
        ("early_exit_threshold", 1.5),
        ("entropy_weight", -0.1),
    ],
)
def test_fields_that_are_not_honoured_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^config field {field} must be ") as caught:
        OuroConfig(**{"num_hidden_layers": 2, field: value})
    assert "\n" not in str(caught.value)


def test_fields_that_are_set_later_are_refused_by_the_model():
    config = tiny_model().config
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"^config field hidden_act must be 'silu', not 'gelu'$"):
        OuroForCausalLM(config)
