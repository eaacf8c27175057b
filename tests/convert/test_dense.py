"""Starting a looped model from a dense one: with `pre`, loop 1 is that model; mismatches are refused by name."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import tokenizer_json
from safetensors.numpy import load_file, save_file

import looplm_jax
from looplm_jax.config import MeshConfig, NormPlacement
from looplm_jax.convert._dense import convert_from_dense, load_dense
from looplm_jax.convert._layout import flat_arrays
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM, head_matrix, init_params
from looplm_jax.sharding import make_mesh

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

VOCAB = 272
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
TOLERANCE = 1e-5  # for values around 1, in float32


def write_dense(folder, kind="Llama", **changes):
    """Saves a random transformers model, random norms included, with `save_pretrained`; returns the model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json(VOCAB))
    return model


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def edit_weights(folder, **changes):
    """Replaces tensors of a folder; None removes one."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def folder(tmp_path):
    write_dense(tmp_path / "dense")
    return tmp_path / "dense"


def tokens_of(batch=2, length=24):
    return np.random.default_rng(1).integers(0, VOCAB, (batch, length))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens)


def assert_loop_one_is(dense, loaded):
    tokens = tokens_of()
    with torch.no_grad():
        theirs = dense(torch.tensor(tokens), output_hidden_states=True)
    out = forward(LoopLM(loaded.config), loaded.params, jnp.asarray(tokens, jnp.int32))
    logits = out.hidden[0] @ head_matrix(loaded.params, loaded.config)
    assert theirs.logits.abs().max() > 1
    np.testing.assert_allclose(out.hidden[0], theirs.hidden_states[-1].numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    np.testing.assert_allclose(logits, theirs.logits.numpy(), atol=TOLERANCE, rtol=TOLERANCE)
    assert out.hidden.shape[0] == loaded.config.loops == 4
    assert np.isfinite(out.hidden).all()
    assert np.isfinite(out.gate_logits).all()


@pytest.mark.parametrize(
    ("kv_heads", "tied", "theta"),
    [
        (4, False, 1e4),
        (2, True, 5e5),
        pytest.param(4, True, 5e5, marks=pytest.mark.slow),
        pytest.param(2, False, 1e4, marks=pytest.mark.slow),
    ],
)
def test_loop_one_of_pre_is_the_dense_model(tmp_path, kv_heads, tied, theta):
    rope = {"rope_type": "default", "rope_theta": theta}
    dense = write_dense(
        tmp_path, num_key_value_heads=kv_heads, tie_word_embeddings=tied, rope_parameters=rope, rms_norm_eps=1e-5
    )
    loaded = load_dense(tmp_path, mesh=one_device())
    assert loaded.config.tied_head is tied
    assert loaded.config.rope_theta == theta
    assert_loop_one_is(dense, loaded)


def test_a_mistral_without_a_window_is_a_llama(tmp_path):
    dense = write_dense(tmp_path, kind="Mistral", sliding_window=None, head_dim=12)
    assert_loop_one_is(dense, load_dense(tmp_path, mesh=one_device()))


def test_fields_of_older_transformers_are_read(tmp_path):
    dense = write_dense(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    edit_config(tmp_path, rope_parameters="absent", rope_theta=5e5, rope_scaling=None, torch_dtype="float32")
    assert_loop_one_is(dense, load_dense(tmp_path, mesh=one_device()))


def test_a_llama_that_does_not_say_its_rope_theta_has_that_of_transformers(tmp_path):
    dense = write_dense(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    edit_config(tmp_path, rope_parameters="absent")
    assert_loop_one_is(dense, load_dense(tmp_path, mesh=one_device()))


def test_rotary_frequencies_of_old_files_are_passed_over(tmp_path):
    dense = write_dense(tmp_path)
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float16) for layer in range(2)}
    edit_weights(tmp_path, **old)
    assert_loop_one_is(dense, load_dense(tmp_path, mesh=one_device()))


@pytest.mark.parametrize("placement", [NormPlacement.SANDWICH, NormPlacement.PRE])
def test_what_a_dense_model_lacks_starts_at_its_initial_value(folder, placement):
    loaded = load_dense(folder, mesh=one_device(), loops=3, norm_placement=placement, seed=5)
    assert loaded.config.loops == 3
    assert loaded.config.norm_placement is placement
    initial = flat_arrays(init_params(LoopLM(loaded.config), jax.random.key(5)))
    given = {name for name in initial if name[0] == "gate" or "post_norm" in ".".join(name)}
    assert len(given) == (4 if placement is NormPlacement.SANDWICH else 2)
    arrays = flat_arrays(loaded.params)
    assert list(arrays) == list(initial)
    for name, array in arrays.items():
        assert np.array_equal(array, initial[name]) == (name in given), name


def test_sandwich_changes_loop_one_and_keeps_every_dense_weight(folder):
    tokens = jnp.asarray(tokens_of(), jnp.int32)
    sandwich, pre = (
        load_dense(folder, mesh=one_device(), norm_placement=placement)
        for placement in (NormPlacement.SANDWICH, NormPlacement.PRE)
    )
    states = [forward(LoopLM(model.config), model.params, tokens).hidden[0] for model in (pre, sandwich)]
    assert np.abs(states[0] - states[1]).max() > 0.1
    theirs = flat_arrays(sandwich.params)
    assert all(np.array_equal(array, theirs[name]) for name, array in flat_arrays(pre.params).items())


def test_second_norms_start_where_they_are_told_and_nothing_else_does(folder):
    options = {"mesh": one_device(), "norm_placement": NormPlacement.SANDWICH}
    ones, small = (flat_arrays(load_dense(folder, second_norm=scale, **options).params) for scale in (1.0, 0.1))
    for name, array in ones.items():
        scale = 0.1 if "post_norm" in ".".join(name) else 1.0
        np.testing.assert_array_equal(np.asarray(array) * np.float32(scale), small[name])


def test_sharded_is_unsharded_bit_for_bit(folder):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread, whole = (flat_arrays(load_dense(folder, mesh=devices).params) for devices in (mesh, one_device()))
    assert len(spread["embedding",].sharding.device_set) == 8
    for name, array in whole.items():
        np.testing.assert_array_equal(spread[name], array)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_checkpoint_is_written_that_loads(folder, tmp_path, dtype):
    path = folder / "model.safetensors"
    save_file({name: tensor.astype(jnp.bfloat16) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    summary = convert_from_dense(folder, tmp_path / "out", loops=2, dtype=dtype)
    loaded = looplm_jax.load(tmp_path / "out")
    leaves = jax.tree.leaves(loaded.params)
    assert {str(leaf.dtype) for leaf in leaves} == {summary.dtype} == {dtype or "bfloat16"}
    assert summary.parameters == sum(leaf.size for leaf in leaves)
    assert (loaded.step, loaded.recipe.name, loaded.recipe.model.loops) == (0, "dense", 2)
    assert loaded.tokenizer.tokenizer_json == tokenizer_json(VOCAB)
    assert loaded.model.apply({"params": loaded.params}, jnp.zeros((1, 4), jnp.int32)).hidden.shape == (2, 1, 4, 32)


def refusal(folder, **options):
    with pytest.raises(UserError) as caught:
        load_dense(folder, mesh=one_device(), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_qwen_2_is_refused_for_its_biases(tmp_path):
    write_dense(tmp_path, kind="Qwen2")
    message = refusal(tmp_path)
    assert "a LoopLM has no biases" in message
    assert "self_attn.k_proj.bias" in message


def test_qwen_2_is_refused_by_its_type_alone(folder):
    edit_config(folder, model_type="qwen2")
    assert "a LoopLM has no biases, so self_attn.q_proj.bias" in refusal(folder)


def test_one_bias_in_a_llama_is_refused(folder):
    edit_weights(folder, **{"model.layers.1.mlp.down_proj.bias": np.zeros(32, np.float32)})
    assert "model.layers.1.mlp.down_proj.bias would be lost" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_parameters="),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"sliding_window": 32}, "sliding_window=32"),
        ({"model_type": "mistral"}, "sliding_window=4096"),
        ({"logits_scaling": 8.0}, "'logits_scaling'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers=3"),
        ({"vocab_size": 273}, "model.embed_tokens.weight"),
    ],
)
def test_a_config_that_is_not_honoured_is_refused_by_name(folder, changes, message):
    edit_config(folder, **changes)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "model.layers.1.mlp.up_proj.weight is missing"),
        ({"model.early_exit_gate.weight": np.ones((1, 32), np.float32)}, "model.early_exit_gate.weight"),
        ({"model.norm.weight": np.full(32, np.nan, np.float32)}, "model.norm.weight holds NaN"),
    ],
)
def test_tensors_that_are_not_a_llama_are_refused_by_name(folder, changes, message):
    edit_weights(folder, **changes)
    assert message in refusal(folder)


def test_less_than_one_loop_is_refused(folder):
    assert refusal(folder, loops=0) == "loops must be at least 1, not 0"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_second_norms_that_are_no_positive_number_are_refused(folder, value):
    message = refusal(folder, norm_placement=NormPlacement.SANDWICH, second_norm=value)
    assert message == f"second_norm must be a positive number, not {value}"


def test_second_norms_of_a_model_without_them_are_refused(folder):
    assert "needs norm placement sandwich" in refusal(folder, second_norm=0.1)


def test_a_folder_that_is_refused_leaves_nothing(folder, tmp_path):
    edit_weights(folder, **{"model.norm.weight": np.full(32, np.inf, np.float32)})
    with pytest.raises(UserError, match="infinite"):
        convert_from_dense(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert_from_dense(folder, tmp_path / "out")
