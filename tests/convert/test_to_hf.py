"""Exporting a checkpoint to a Hugging Face folder: every file, every tensor, and every refusal."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import tokenizer_json
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny_checkpoints import TINY, changed, random_params, read_json, tiny_recipe, write_checkpoint

from looplm_jax.config import Injection, NormPlacement
from looplm_jax.convert import _export_hf
from looplm_jax.convert._export_hf import convert_to_hf
from looplm_jax.convert._layout import array_shapes, flat_arrays, torch_layout
from looplm_jax.data.tokenizers import FolderTokenizer, SymbolTokenizer, TokenIds
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import count_params

SMALL_FILES = {
    "README.md",
    "config.json",
    "configuration_looplm.py",
    "generation_config.json",
    "modeling_looplm.py",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run"))


def names(folder):
    return {path.name for path in folder.iterdir()}


def wanted_tensors(model, dtype="float32", seed=0):
    """Returns the bits of every tensor of `random_params` by name, from the layout alone."""
    params = flat_arrays(random_params(model, dtype, seed))
    arrays = {path: np.asarray(array) for path, array in params.items()}
    layout = torch_layout(array_shapes(model))
    return {t.name: t.to_torch(arrays[t.path] if t.layer is None else arrays[t.path][t.layer]) for t in layout}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == np.ascontiguousarray(tensor).tobytes()


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        (TINY, "float32"),
        (TINY, "bfloat16"),
        (changed(tied_head=True, num_layers=1), "float32"),
    ],
)
def test_every_tensor_as_it_is_stored(tmp_path, model, dtype):
    done = convert_to_hf(write_checkpoint(tmp_path / "run", tiny_recipe(model), dtype=dtype), tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), wanted_tensors(model, dtype))
    assert done.dtype == dtype == read_json(tmp_path / "out" / "config.json")["torch_dtype"]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_files_and_what_is_said_of_them(run, tmp_path):
    done = convert_to_hf(run, tmp_path / "out")
    assert names(tmp_path / "out") == set(done.files) == SMALL_FILES | {"model.safetensors"}
    assert names(tmp_path) == {"out"}
    assert str(done).startswith(
        f"wrote step 30, {done.weights.bytes:,} bytes of float32 in 1 file(s), to {tmp_path}/out"
    )
    assert done.weights.bytes == sum(tensor.nbytes for tensor in weights(tmp_path / "out").values())


def test_code_of_a_tokenizer_is_left_out_and_named(tmp_path):
    pytest.importorskip("tokenizers")
    files = {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["theirs.Tokenizer", null]}}'}
    tokenizer = FolderTokenizer.of(tokenizer_json(272), TokenIds(bos=0, eos=0, pad=None, stop=(0,)), files)
    recipe = tiny_recipe(changed(vocab_size=272, num_layers=1))
    done = convert_to_hf(write_checkpoint(tmp_path / "run", recipe, tokenizer=tokenizer), tmp_path / "out")
    named = "auto_map of tokenizer_config.json is left out: the code that it names is not copied"
    assert str(done).splitlines()[0] == named
    assert "auto_map" not in read_json(tmp_path / "out" / "tokenizer_config.json")


def test_configurations(run, tmp_path):
    convert_to_hf(run, tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["model_type"], config["total_ut_steps"], config["num_key_value_heads"]) == ("ouro", 3, 2)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    generation = read_json(tmp_path / "out" / "generation_config.json")
    assert generation == {"bos_token_id": 0, "eos_token_id": [0, 2], "pad_token_id": 0}


def test_a_tokenizer_without_chat_stops_at_its_end_of_text(tmp_path):
    tokenizer = SymbolTokenizer([f"word{n}" for n in range(23)])
    convert_to_hf(write_checkpoint(tmp_path / "run", tokenizer=tokenizer), tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"] == [0]
    assert "chat_template.jinja" not in names(tmp_path / "out")


@pytest.mark.parametrize(("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_dtype(tmp_path, stored, wanted):
    run = write_checkpoint(tmp_path / "run", dtype=stored)
    convert_to_hf(run, tmp_path / "out", dtype=wanted)
    cast = {name: tensor.astype(jnp.dtype(wanted)) for name, tensor in wanted_tensors(TINY, stored).items()}
    assert_same_bits(weights(tmp_path / "out"), cast)


def test_mixed_dtypes_lose_nothing(tmp_path):
    params = random_params(TINY, "bfloat16")
    params["gate"] = jax.tree.map(lambda x: x.astype(jnp.float32), params["gate"])
    done = convert_to_hf(write_checkpoint(tmp_path / "run", params=params), tmp_path / "out")
    assert done.dtype == "float32"
    wide = {name: tensor.astype(np.float32) for name, tensor in wanted_tensors(TINY, "bfloat16").items()}
    found = weights(tmp_path / "out")
    assert_same_bits(
        {n: t for n, t in found.items() if "gate." not in n}, {n: t for n, t in wide.items() if "gate." not in n}
    )


def test_a_step_by_its_number(tmp_path):
    write_checkpoint(tmp_path / "run", params=random_params(TINY, seed=1), step=10)
    run = write_checkpoint(tmp_path / "run", params=random_params(TINY, seed=2), step=20)
    assert convert_to_hf(run, tmp_path / "newest").step == 20
    assert convert_to_hf(run, tmp_path / "older", step=10).step == 10
    assert_same_bits(weights(tmp_path / "newest"), wanted_tensors(TINY, seed=2))
    assert_same_bits(weights(tmp_path / "older"), wanted_tensors(TINY, seed=1))


def test_a_damaged_newer_step_is_passed_over_with_a_warning(tmp_path):
    write_checkpoint(tmp_path / "run", params=random_params(TINY, seed=1), step=10)
    run = write_checkpoint(tmp_path / "run", params=random_params(TINY, seed=2), step=20)
    for file in (run / "checkpoints" / "20" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(bytes(file.stat().st_size))
    done = convert_to_hf(run, tmp_path / "out")
    assert done.step == 10
    assert str(done).startswith("step 20 is damaged: ")
    assert_same_bits(weights(tmp_path / "out"), wanted_tensors(TINY, seed=1))


def test_shards_and_their_index(run, tmp_path):
    done = convert_to_hf(run, tmp_path / "out", max_shard_bytes=4000)
    count = len(done.weights.files)
    assert count > 3
    assert done.weights.files == tuple(f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))
    assert names(tmp_path / "out") == SMALL_FILES | {*done.weights.files, "model.safetensors.index.json"}
    assert_same_bits(weights(tmp_path / "out"), wanted_tensors(TINY))
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in wanted_tensors(TINY).values())}
    places = {name: file for file in done.weights.files for name in load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == places


# Refusals


def refusal(run, out, **options):
    """Returns the error line, and checks that no output remains."""
    before = names(out.parent)
    with pytest.raises(UserError) as raised:
        convert_to_hf(run, out, **options)
    assert "\n" not in str(raised.value)
    assert names(out.parent) == before
    return str(raised.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"injection": Injection.ADD}, "injection=add"),
        ({"injection": Injection.LINEAR}, "injection=linear"),
        ({"prelude_layers": 1}, "prelude_layers=1"),
        ({"coda_layers": 2}, "coda_layers=2"),
        ({"norm_placement": NormPlacement.PRE}, "norm_placement=pre"),
    ],
)
def test_what_ouro_cannot_express(tmp_path, changes, what):
    run = write_checkpoint(tmp_path / "run", tiny_recipe(changed(**changes)))
    assert refusal(run, tmp_path / "out") == f"Hugging Face's Ouro cannot express model.{what}; keep our format"


def test_weights_that_are_not_finite(tmp_path):
    params = random_params(TINY)
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
    line = refusal(write_checkpoint(tmp_path / "run", params=params), tmp_path / "out")
    assert line == ("tensor model.norm.weight has values that are not finite in float32; take another dtype or step")


def test_weights_too_large_for_bfloat16(tmp_path):
    params = random_params(TINY)
    params["gate"]["bias"] = jnp.full((1,), 3.4e38)
    run = write_checkpoint(tmp_path / "run", params=params)
    assert "model.early_exit_gate.bias has values that are not finite in bfloat16" in refusal(
        run, tmp_path / "out", dtype="bfloat16"
    )


def test_a_folder_with_something_in_it(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert refusal(run, tmp_path / "out") == f"{tmp_path}/out is not empty; choose another folder"
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_other_mistakes(run, tmp_path):
    assert refusal(run, tmp_path / "out", dtype="int8") == "weights are written in float32 or bfloat16, not int8"
    assert "holds no step 7; it holds 30" in refusal(run, tmp_path / "out", step=7)
    assert "is not a checkpoint" in refusal(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "file is a file; choose another folder" in refusal(run, tmp_path / "file")


# Failures during the export


@pytest.mark.parametrize("where", ["_read", "_write_weights", "model_card"])
def test_an_interrupt_half_way_leaves_nothing(run, tmp_path, monkeypatch, where):
    original, calls = getattr(_export_hf, where), []

    def interrupted(*arguments, **options):
        calls.append(original(*arguments, **options))
        if where != "_read" or len(calls) == 20:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(_export_hf, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_to_hf(run, tmp_path / "out", max_shard_bytes=4000)
    assert names(tmp_path) == set()


LIMITED = """
import resource, sys
from looplm_jax.convert._export_hf import convert_to_hf
from looplm_jax.errors import UserError
size = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
try:
    convert_to_hf(sys.argv[2], sys.argv[3])
except UserError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_disk_that_is_full_half_way_leaves_nothing(run, tmp_path):
    size = 2 * count_params(TINY)  # half of the bytes of the float32 weights
    command = [sys.executable, "-c", LIMITED, str(size), str(run), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.stderr == (
        f"refused: {tmp_path}/out cannot be written (File too large); fix that and run the same command again\n"
    )
    assert names(tmp_path) == set()
