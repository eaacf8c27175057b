"""A model may have more ids than its tokenizer; the extra rows are imported and exported like the others."""

import dataclasses
import json

import jax
import pytest
from hf_folders import MULTI_HEAD, config_json, make_tensors, tokenizer_json, write_weights
from safetensors.numpy import load_file
from tiny_checkpoints import read_json

from looplm_jax.config import MeshConfig
from looplm_jax.convert._export_hf import convert_to_hf
from looplm_jax.convert._import_hf import convert_from_hf, load_hf
from looplm_jax.errors import UserError
from looplm_jax.loading import load
from looplm_jax.sharding import make_mesh

pytest.importorskip("tokenizers")
PADDED = dataclasses.replace(MULTI_HEAD, vocab_size=320)


def write_padded(folder):
    folder.mkdir()
    tensors = make_tensors(PADDED)
    (folder / "config.json").write_text(json.dumps(config_json(PADDED)))
    (folder / "tokenizer.json").write_bytes(tokenizer_json(272))
    write_weights(folder, tensors)
    return tensors


def test_padding_goes_in_and_out_to_the_bit(tmp_path):
    tensors = write_padded(tmp_path / "hf")
    convert_from_hf(tmp_path / "hf", tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint")
    assert (loaded.model.config.vocab_size, loaded.need_tokenizer().vocab_size) == (320, 272)
    convert_to_hf(tmp_path / "checkpoint", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(back[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    assert read_json(tmp_path / "back" / "config.json")["vocab_size"] == 320
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == tokenizer_json(272)


def test_a_folder_without_a_tokenizer_is_a_model_and_its_parameters(tmp_path):
    write_padded(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    assert load(tmp_path / "hf").tokenizer is None
    assert load_hf(tmp_path / "hf", mesh=make_mesh(MeshConfig(), jax.devices()[:1])).tokenizer is None
    with pytest.raises(UserError, match=f"^{tmp_path}/hf has no tokenizer.json, which this needs; copy it from where"):
        load(tmp_path / "hf").need_tokenizer()
