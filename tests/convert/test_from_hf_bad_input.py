"""Every error in a folder gives one line that names it, and no output remains."""

import dataclasses
import errno
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import MULTI_HEAD, TIED, make_tensors, tokenizer_json, write_hf_folder

from looplm_jax.config import MeshConfig
from looplm_jax.convert import _import_hf
from looplm_jax.convert._import_hf import convert_from_hf, load_hf
from looplm_jax.errors import UserError
from looplm_jax.sharding import make_mesh

pytest.importorskip("tokenizers")
QUERY = "model.layers.1.self_attn.q_proj.weight"


def refusal(folder, mesh=None, **options):
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(UserError) as caught:
        load_hf(folder, mesh=mesh, **options)
    (line,) = str(caught.value).splitlines()
    return line


def write_with(folder, changes, config=MULTI_HEAD):
    """Writes a folder with some tensors changed, added, or removed by None."""
    tensors = {**make_tensors(config), **changes}
    write_hf_folder(folder, config, tensors={name: value for name, value in tensors.items() if value is not None})


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def test_a_missing_tensor(tmp_path):
    write_with(tmp_path, {QUERY: None})
    assert refusal(tmp_path) == f"{tmp_path}: tensor {QUERY} is missing"


def test_a_surplus_tensor(tmp_path):
    write_with(tmp_path, {"model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: tensor model.layers.1.self_attn.q_proj.bias is not part of the model")


@pytest.mark.parametrize("name", [QUERY, "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_a_shape_that_is_off_by_one(tmp_path, name):
    rows = make_tensors(MULTI_HEAD)[name].shape[0]
    write_with(tmp_path, {name: np.zeros((rows + 1, 32), np.float32)})
    assert refusal(tmp_path).startswith(f"{tmp_path}: tensor {name} has shape [{rows + 1}, 32], ")


def test_a_tensor_with_its_axes_the_other_way_round(tmp_path):
    write_with(tmp_path, {"model.layers.1.mlp.up_proj.weight": np.zeros((32, 48), np.float32)})
    line = "tensor model.layers.1.mlp.up_proj.weight has shape [32, 48], the model needs [48, 32]"
    assert refusal(tmp_path) == f"{tmp_path}: {line}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", [QUERY, "model.norm.weight", "lm_head.weight"])
def test_numbers_that_are_not_finite(tmp_path, value, dtype, name):
    tensors = make_tensors(MULTI_HEAD, dtype)
    tensors[name].reshape(-1)[-1] = value
    write_hf_folder(tmp_path, dtype=dtype, tensors=tensors)
    wanted = f"tensor {name} holds NaN, or a number that is infinite in {jnp.dtype(dtype)}"
    assert refusal(tmp_path) == f"{tmp_path}/model.safetensors: {wanted}"


def test_numbers_beyond_the_wanted_type(tmp_path):
    tensors = make_tensors(MULTI_HEAD)
    tensors[QUERY][3, 4] = 70_000.0
    write_hf_folder(tmp_path, tensors=tensors)
    line = refusal(tmp_path, dtype=jnp.float16)
    assert line.endswith(f"tensor {QUERY} holds NaN, or a number that is infinite in float16")


def test_two_types_of_numbers(tmp_path):
    tensors = make_tensors(MULTI_HEAD, jnp.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    write_hf_folder(tmp_path, tensors=tensors)
    stored = "model.embed_tokens.weight in bfloat16, model.norm.weight in float32"
    assert refusal(tmp_path).startswith(f"{tmp_path} has tensors of several types ({stored}); choose one with dtype")
    load_hf(tmp_path, mesh=make_mesh(MeshConfig(), jax.devices()[:1]), dtype=jnp.float32)


def test_a_head_that_is_not_the_embedding(tmp_path):
    head = make_tensors(TIED)["model.embed_tokens.weight"]
    head[7, 5] = np.nextafter(head[7, 5], 9, dtype=np.float32)
    write_with(tmp_path, {"lm_head.weight": head}, TIED)
    differs = "lm_head.weight differs from model.embed_tokens.weight, but config.json says tie_word_embeddings=true"
    assert refusal(tmp_path) == f"{tmp_path}: {differs}; set it to false to keep both"


def test_no_head_although_it_is_not_tied(tmp_path):
    write_with(tmp_path, {"lm_head.weight": None})
    assert refusal(tmp_path) == f"{tmp_path}: tensor lm_head.weight is missing"


@pytest.mark.parametrize("layers", [1, 3, 2**31 - 1])
def test_another_number_of_layers(tmp_path, layers):
    write_hf_folder(tmp_path)
    change_config(tmp_path, num_hidden_layers=layers, layer_types=None)
    says = f"config.json says num_hidden_layers={layers}, but the files hold 2 layers"
    assert refusal(tmp_path) == f"{tmp_path}: {says}"


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("vocab_size", "model.embed_tokens.weight"),
        ("hidden_size", "model.embed_tokens.weight"),
        ("head_dim", "model.layers.0.self_attn.q_proj.weight"),
        ("intermediate_size", "model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_sizes_that_no_memory_holds_are_refused_before_anything_is_made(tmp_path, field, name):
    write_hf_folder(tmp_path)
    change_config(tmp_path, **{field: 2**31 - 2})
    assert refusal(tmp_path).startswith(f"{tmp_path}: tensor {name} has shape [")


def test_heads_that_no_memory_holds(tmp_path):
    write_hf_folder(tmp_path)
    change_config(tmp_path, num_attention_heads=2**30, num_key_value_heads=2**30)
    assert "tensor model.layers.0.self_attn.q_proj.weight has shape [32, 32]" in refusal(tmp_path)
    change_config(tmp_path, num_attention_heads=4, num_key_value_heads=2)
    assert "tensor model.layers.0.self_attn.k_proj.weight has shape [32, 32]" in refusal(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"use_sliding_window": True},
        {"sliding_window": 4096, "use_sliding_window": None},
        {"hidden_act": "gelu"},
        {"attention_dropout": 0.1},
        {"vocab_size": 10**400},
        {"rms_norm_eps": float("nan")},
        {"total_ut_steps": 0},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "qwen2\nor another"},
    ],
    ids=str,
)
def test_a_field_that_is_not_honoured(tmp_path, changes):
    write_hf_folder(tmp_path)
    change_config(tmp_path, **changes)
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: config.json: ")
    assert next(iter(changes)) in line


@pytest.mark.parametrize(
    ("prefix", "remedy"),
    [
        ("_orig_mod.", "torch.compile; save model._orig_mod"),
        ("module.", "DataParallel or DistributedDataParallel; save model.module"),
        ("base_model.model.", "PEFT; save model.merge_and_unload()"),
        ("module._orig_mod.", "torch.compile; save model._orig_mod"),
        ("_fsdp_wrapped_module.", "FSDP; save its full state dict"),
    ],
)
def test_names_that_a_wrapper_changed(tmp_path, prefix, remedy):
    tensors = {prefix + name: tensor for name, tensor in make_tensors(MULTI_HEAD).items()}
    write_hf_folder(tmp_path, tensors=tensors)
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}: tensor {prefix}")
    assert remedy in line


def test_a_missing_config(tmp_path):
    write_hf_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    assert refusal(tmp_path) == f"{tmp_path}/config.json is missing; copy it from where the model comes from"


def test_a_missing_tokenizer_where_one_is_needed(tmp_path):
    write_hf_folder(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    with pytest.raises(UserError) as caught:
        convert_from_hf(tmp_path / "hf", tmp_path / "out")
    assert str(caught.value) == (
        f"{tmp_path}/hf has no tokenizer.json, which this needs; copy it from where the model comes from"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_damaged_tokenizer(tmp_path):
    write_hf_folder(tmp_path)
    content = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(content[: len(content) // 2])
    assert refusal(tmp_path).startswith(f"{tmp_path}/tokenizer.json")


def test_a_tokenizer_of_another_vocabulary(tmp_path):
    write_hf_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(273))
    says = "has 273 tokens, but config.json says vocab_size=272, which is fewer; copy both from the same model"
    assert refusal(tmp_path) == f"{tmp_path}/tokenizer.json {says}"


def test_without_the_package_of_the_tokenizer(tmp_path, monkeypatch):
    write_hf_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'looplm_jax[hf]'" in refusal(tmp_path)


def test_a_mesh_that_does_not_fit(tmp_path):
    write_hf_folder(tmp_path)
    mesh = make_mesh(MeshConfig(tensor=8))
    assert refusal(tmp_path, mesh=mesh).startswith("mesh.tensor=8 does not divide model.num_heads=4")


@pytest.fixture
def remains(tmp_path):
    """Returns the content of the output folder."""
    (tmp_path / "outputs").mkdir()
    return lambda: list((tmp_path / "outputs").iterdir())


def test_a_conversion_that_is_refused_leaves_nothing(tmp_path, remains):
    write_with(tmp_path / "hf", {QUERY: None})
    with pytest.raises(UserError, match="is missing"):
        convert_from_hf(tmp_path / "hf", tmp_path / "outputs" / "out")
    assert remains() == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_conversion_that_fails_half_way_leaves_nothing(tmp_path, remains, monkeypatch, error):
    def write_and_fail(folder, *_):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "half").write_text("half")
        raise error

    write_hf_folder(tmp_path / "hf")
    monkeypatch.setattr(_import_hf, "write_converted", write_and_fail)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        convert_from_hf(tmp_path / "hf", tmp_path / "outputs" / "out")
    assert isinstance(caught.value, KeyboardInterrupt) or "no space left on the disk" in str(caught.value)
    assert remains() == []


def test_an_output_that_is_not_empty_is_found_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="out is not empty; choose another folder"):
        convert_from_hf(tmp_path / "nowhere", tmp_path / "out")


def test_the_same_messages_reach_who_loads(tmp_path):
    from looplm_jax.loading import load

    write_with(tmp_path, {QUERY: None}, dataclasses.replace(MULTI_HEAD))
    with pytest.raises(UserError, match=r"q_proj\.weight is missing"):
        load(tmp_path)
