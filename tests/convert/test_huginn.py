"""Huginn folders become checkpoints and folders again, bit for bit, and compute what the published code computes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from huginn_golden import CONFIG, PUBLISHED, huginn_arrays, huginn_params, write_folder
from safetensors.numpy import load_file
from tiny_checkpoints import SYMBOLS as FEW_SYMBOLS
from tiny_checkpoints import read_json, tiny_recipe, write_checkpoint

import looplm_jax
from looplm_jax.config import GatePlacement, Objective, Stage
from looplm_jax.convert import convert_from_hf, convert_to_hf, load_hf
from looplm_jax.convert._huginn_config import from_huginn_config, to_huginn_config
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import count_params
from looplm_jax.models.presets import huginn, huginn_0125

pytest.importorskip("tokenizers")

EMBEDDING, HEAD, TABLE = "transformer.wte.weight", "lm_head.weight", "freqs_cis"


def refusal(path):
    with pytest.raises(UserError) as error:
        load_hf(path)
    return str(error.value).removeprefix(f"{path}: ")


def test_a_folder_becomes_the_golden_parameters(tmp_path):
    write_folder(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs").config, load_hf(tmp_path / "theirs").params
    assert config == CONFIG
    wanted = huginn_params()
    assert params.keys() == wanted.keys()

    def compare(ours, theirs):
        for name, value in theirs.items():
            if isinstance(value, dict):
                compare(ours[name], value)
            else:
                np.testing.assert_array_equal(ours[name], value, err_msg=name)

    compare(params, wanted)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_in_and_out_again_is_bit_identical(tmp_path, dtype):
    theirs = write_folder(tmp_path / "theirs", dtype=dtype)
    report = convert_from_hf(tmp_path / "theirs", tmp_path / "ours")
    assert report.parameters == sum(array.size for name, array in theirs.items() if name != TABLE)
    convert_to_hf(tmp_path / "ours", tmp_path / "again", max_shard_bytes=50_000)

    written = {name: x for file in (tmp_path / "again").glob("*.safetensors") for name, x in load_file(file).items()}
    assert written.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (written[name].dtype, written[name].shape) == (array.dtype, array.shape), name
        if name == TABLE:
            np.testing.assert_allclose(written[name].astype(np.float32), array.astype(np.float32), atol=1e-2)
        else:
            assert written[name].tobytes() == array.tobytes(), name

    config = read_json(tmp_path / "again" / "config.json")
    same = set(PUBLISHED) - {"mean_backprop_depth", "padding_multiple", "test_time_noise_type"}
    assert {name: config[name] for name in same} == {name: PUBLISHED[name] for name in same}
    assert "num_steps=8" in (tmp_path / "again" / "README.md").read_text()
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {
        f"{kind}_{family}.py" for kind in ("configuration", "modeling") for family in ("huginn", "looplm")
    }
    assert load_hf(tmp_path / "again").config == CONFIG


def test_the_table_of_angles_is_the_published_one_in_float32(tmp_path):
    theirs = write_folder(tmp_path / "theirs")
    convert_from_hf(tmp_path / "theirs", tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "again")
    np.testing.assert_allclose(load_file(tmp_path / "again" / "model.safetensors")[TABLE], theirs[TABLE], atol=1e-6)


def test_a_checkpoint_trains_on_its_last_loop_and_is_loaded_like_any_other(tmp_path):
    write_folder(tmp_path / "theirs")
    convert_from_hf(tmp_path / "theirs", tmp_path / "ours")
    loaded = looplm_jax.load(tmp_path / "ours")
    assert loaded.recipe.stages[0].objective is Objective.LAST_LOSS
    assert loaded.recipe.model == CONFIG


def test_a_stored_head_must_equal_the_embedding_and_a_table_is_optional(tmp_path):
    embedding = huginn_arrays()[f"w/{EMBEDDING}"]
    write_folder(tmp_path / "same", changes={HEAD: embedding, TABLE: None})
    assert load_hf(tmp_path / "same").config == CONFIG

    write_folder(tmp_path / "other", changes={HEAD: embedding + 1})
    assert refusal(tmp_path / "other").startswith(
        f"{HEAD} differs from {EMBEDDING}, but config.json says tie_embeddings=true"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"injection_type": "add"}, "config.json: injection_type='add' is not supported, only 'linear'"),
        ({"bias": True}, "config.json: bias=True is not supported, only False"),
        ({"block_class_name": "Block"}, "config.json: block_class_name='Block' is not supported, only 'SandwichBlock'"),
        ({"mlp_class_name": "MLP"}, "config.json: mlp_class_name='MLP' is not supported, only 'GatedMLP'"),
        ({"head_dim": 9}, "config.json: head_dim=9 contradicts other fields, which give 8"),
        ({"n_layers": 9}, "config.json: n_layers=9 contradicts other fields, which give 8"),
        ({"n_embd": None}, "config.json: field n_embd is missing"),
        (
            {"mean_recurence": 3},
            "config.json: field 'mean_recurence' is not supported; did you mean 'mean_recurrence'?",
        ),
        ({"n_layers_in_coda": 3, "n_layers": 9}, "config.json asks for 3 layers of coda, the files hold 2"),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    write_folder(tmp_path / "theirs", values=PUBLISHED | changes)
    assert refusal(tmp_path / "theirs") == message


def test_missing_fields_take_the_published_values():
    values = {name: value for name, value in PUBLISHED.items() if name not in ("rope_base", "norm_eps", "head_dim")}
    assert from_huginn_config(values) == CONFIG


def test_tensors_that_do_not_fit_are_named(tmp_path):
    name = "transformer.core_block.1.mlp.fc.weight"
    write_folder(tmp_path / "theirs", changes={name: np.zeros((3, 32), np.float32)})
    assert refusal(tmp_path / "theirs") == f"tensor {name} has shape [3, 32], the model needs [112, 32]"


def test_a_model_that_huginn_cannot_express_is_not_written(tmp_path):
    stages = (Stage(name="pretrain", steps=30, batch_size=4, sequence_length=32, loops=3),)
    model = huginn(
        vocab_size=FEW_SYMBOLS.vocab_size,
        width=16,
        mlp_width=24,
        num_heads=2,
        num_layers=1,
        prelude_layers=1,
        coda_layers=1,
        loops=3,
        max_positions=64,
    )
    gated = dataclasses.replace(model, gate=GatePlacement.AFTER)
    run = write_checkpoint(tmp_path / "run", tiny_recipe(gated, stages=stages))
    with pytest.raises(UserError) as error:
        convert_to_hf(run, tmp_path / "out")
    assert str(error.value) == "Huginn's code cannot express model.gate=after, only none; keep our format"


def test_the_released_model_has_its_exact_number_of_parameters():
    assert count_params(huginn_0125()) == 3_564_976_800
    assert from_huginn_config(to_huginn_config(huginn_0125(), dtype="float32")) == huginn_0125()
