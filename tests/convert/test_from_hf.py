"""Importing Hugging Face folders: every tensor arrives bit for bit in its place, on any devices."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import GROUPED, MULTI_HEAD, SPECIAL_TOKENS, TIED, config_json, make_tensors, write_hf_folder

from looplm_jax.checkpoints import inspect_steps
from looplm_jax.config import MeshConfig, ModelConfig
from looplm_jax.convert._import_hf import convert_from_hf, load_hf, read_hf_config
from looplm_jax.convert._layout import flat_arrays, torch_layout
from looplm_jax.loading import load
from looplm_jax.sharding import make_mesh

pytest.importorskip("tokenizers")
MODELS = {"multi-head": MULTI_HEAD, "grouped-query": GROUPED, "tied": TIED}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def as_torch(params):
    """Returns every PyTorch tensor, computed from our parameters."""
    arrays = {path: np.asarray(array) for path, array in flat_arrays(params).items()}
    return {
        tensor.name: tensor.to_torch(arrays[tensor.path] if tensor.layer is None else arrays[tensor.path][tensor.layer])
        for tensor in torch_layout(params)
    }


def assert_same_bits(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name in wanted:
        assert (actual[name].dtype, actual[name].shape) == (wanted[name].dtype, wanted[name].shape), name
        assert actual[name].tobytes() == wanted[name].tobytes(), name


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_to_the_bit(tmp_path, config, dtype, shards):
    saved = write_hf_folder(tmp_path, config, dtype=dtype, shards=shards)
    model = load_hf(tmp_path, mesh=one_device())
    assert_same_bits(as_torch(model.params), saved)


def test_where_each_tensor_belongs(tmp_path):
    """By hand, for a matrix of every kind: PyTorch stores [out, in], we store [in, out] with a separate head axis."""
    saved = write_hf_folder(tmp_path, GROUPED)
    params = load_hf(tmp_path, mesh=one_device()).params
    layers, width, head = params["core"]["layers"], GROUPED.width, GROUPED.head_width
    for index in range(GROUPED.num_layers):
        at = f"model.layers.{index}"
        query = saved[f"{at}.self_attn.q_proj.weight"].T.reshape(width, 4, head)
        np.testing.assert_array_equal(layers["attention"]["query"]["kernel"][index], query)
        key = saved[f"{at}.self_attn.k_proj.weight"].T.reshape(width, 2, head)
        np.testing.assert_array_equal(layers["attention"]["key"]["kernel"][index], key)
        out = saved[f"{at}.self_attn.o_proj.weight"].T.reshape(4, head, width)
        np.testing.assert_array_equal(layers["attention"]["out"]["kernel"][index], out)
        np.testing.assert_array_equal(layers["mlp"]["down"]["kernel"][index], saved[f"{at}.mlp.down_proj.weight"].T)
        second = saved[f"{at}.post_attention_layernorm_2.weight"]
        np.testing.assert_array_equal(layers["mlp_post_norm"]["scale"][index], second)
    np.testing.assert_array_equal(params["embedding"], saved["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["head"], saved["lm_head.weight"].T)
    np.testing.assert_array_equal(params["gate"]["kernel"], saved["model.early_exit_gate.weight"][0])


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_the_wanted_type(tmp_path, stored, wanted):
    saved = write_hf_folder(tmp_path, dtype=stored)
    model = load_hf(tmp_path, mesh=one_device(), dtype=wanted)
    assert_same_bits(as_torch(model.params), {name: tensor.astype(wanted) for name, tensor in saved.items()})


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_spread_over_devices_it_is_the_same(tmp_path, config):
    saved = write_hf_folder(tmp_path, config, dtype=jnp.bfloat16)
    params = load_hf(tmp_path, mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))).params
    assert_same_bits(as_torch(params), saved)
    query = params["core"]["layers"]["attention"]["query"]["kernel"]
    layers, width, heads, head_dim = query.shape
    assert query.sharding.shard_shape(query.shape) == (layers, width // 2, heads // 2, head_dim)
    assert len(query.sharding.device_set) == 8


def test_replicas_do_not_share_what_a_step_may_overwrite(tmp_path):
    """Parameters are donated to a training step; one array must not be overwritten through another."""
    saved = write_hf_folder(tmp_path)
    params = load_hf(tmp_path, mesh=make_mesh(MeshConfig(data=8))).params
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    assert_same_bits(as_torch(double(params)), {name: tensor + tensor for name, tensor in saved.items()})


def test_a_tied_model_may_come_with_its_head(tmp_path):
    tensors = make_tensors(TIED)
    write_hf_folder(tmp_path, TIED, tensors={**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    model = load_hf(tmp_path, mesh=one_device())
    assert model.config.tied_head
    assert_same_bits(as_torch(model.params), tensors)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_config_says_the_model(tmp_path, config):
    write_hf_folder(tmp_path, config)
    filled = dataclasses.replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_width)
    assert read_hf_config(tmp_path) == filled


@pytest.mark.parametrize("dtype", [None, "float32", jnp.bfloat16])
def test_a_folder_becomes_a_checkpoint(tmp_path, dtype):
    saved = write_hf_folder(tmp_path / "Ouro-tiny", GROUPED, dtype=jnp.bfloat16, shards=2)
    written = convert_from_hf(tmp_path / "Ouro-tiny", tmp_path / "out", dtype=dtype)
    wanted = jnp.dtype(dtype or jnp.bfloat16)
    loaded = load(tmp_path / "out")
    assert_same_bits(as_torch(loaded.params), {name: tensor.astype(wanted) for name, tensor in saved.items()})
    numbers = sum(tensor.size for tensor in saved.values())
    assert str(written) == (
        f"wrote step 0, {numbers:,} parameters, {numbers * wanted.itemsize:,} bytes of {wanted}, to {tmp_path}/out"
    )
    (report,) = inspect_steps(str(tmp_path / "out"))
    assert (report.step, report.damage, report.parameters, report.permanent) == (0, None, numbers, True)
    assert loaded.recipe.name == "Ouro-tiny"
    assert loaded.recipe.description == "converted from a Hugging Face folder"
    assert loaded.recipe.model == written.model == read_hf_config(tmp_path / "Ouro-tiny")
    assert [loaded.tokenizer.token_id(name) for name in SPECIAL_TOKENS] == [0, 1, 2]
    assert loaded.tokenizer.tokenizer_json == (tmp_path / "Ouro-tiny" / "tokenizer.json").read_bytes()


def test_a_short_model_is_evaluated_on_short_sequences(tmp_path):
    write_hf_folder(tmp_path / "hf", dataclasses.replace(MULTI_HEAD, max_positions=16, loops=3))
    convert_from_hf(tmp_path / "hf", tmp_path / "out")
    (stage,) = load(tmp_path / "out").recipe.stages
    assert (stage.name, stage.sequence_length, stage.loops) == ("converted", 16, 3)


def test_a_checkpoint_is_not_overwritten(tmp_path):
    write_hf_folder(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="out is not empty; choose another folder"):
        convert_from_hf(tmp_path / "hf", tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_the_published_config_is_read(tmp_path):
    """With all fields of ByteDance/Ouro-1.4B that `to_ouro_config` omits."""
    write_hf_folder(tmp_path)
    published = {
        **config_json(MULTI_HEAD, jnp.bfloat16),
        "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig"},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "transformers_version": "4.55.0",
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert read_hf_config(tmp_path).width == MULTI_HEAD.width


MEMORY = """
import sys, jax, jax.numpy as jnp
from looplm_jax.config import MeshConfig
from looplm_jax.convert._import_hf import load_hf
from looplm_jax.sharding import make_mesh

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

load_hf(sys.argv[1], mesh=make_mesh(MeshConfig(), jax.devices()[:1]), dtype=sys.argv[3])
before = peak()
params = load_hf(sys.argv[2], mesh=make_mesh(MeshConfig(), jax.devices()[:1]), dtype=sys.argv[3]).params
print(peak() - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Beyond the weights, one array and one tensor exist at a time. Converting a tiny model first loads JAX itself."""
    config = ModelConfig(vocab_size=272, width=512, mlp_width=1536, num_layers=16, num_heads=8, max_positions=128)
    write_hf_folder(tmp_path / "tiny")
    write_hf_folder(tmp_path / "large", config)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "tiny"), str(tmp_path / "large"), "bfloat16"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    growth, size = map(int, done.stdout.split())
    assert size > 100_000_000
    assert growth < 1.3 * size + 20_000_000, f"{growth / size:.2f}"
