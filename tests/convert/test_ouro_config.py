import dataclasses

import pytest

from looplm_jax.config import (
    GatePlacement,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)
from looplm_jax.convert._ouro_config import from_llama_config, from_ouro_config, to_ouro_config
from looplm_jax.errors import UserError
from looplm_jax.models.presets import ouro_1_4b, ouro_2_6b

PUBLISHED = {
    "architectures": ["OuroForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig"},
    "bos_token_id": 0,
    "early_exit_threshold": 1.0,
    "eos_token_id": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "layer_types": ["full_attention"] * 24,
    "max_position_embeddings": 65536,
    "max_window_layers": 24,
    "model_type": "ouro",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "total_ut_steps": 4,
    "transformers_version": "4.55.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 49152,
}
LLAMA = {name: value for name, value in PUBLISHED.items() if name not in ("total_ut_steps", "layer_types")}
LLAMA = {**LLAMA, "model_type": "llama", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


def explicit(config):
    return dataclasses.replace(config, num_kv_heads=config.kv_heads, head_dim=config.head_width)


def test_the_published_file_is_our_preset():
    assert from_ouro_config(PUBLISHED) == explicit(ouro_1_4b())


@pytest.mark.parametrize("preset", [ouro_1_4b(), ouro_2_6b()])
def test_there_and_back(preset):
    assert from_ouro_config(to_ouro_config(preset, dtype="bfloat16")) == explicit(preset)


def test_every_published_field_is_written():
    written = to_ouro_config(ouro_1_4b(), dtype="bfloat16")
    of_others = {"bos_token_id", "eos_token_id", "transformers_version", "auto_map"}
    for name in set(PUBLISHED) - of_others:
        assert written[name] == PUBLISHED[name]


def test_grouped_query_and_tied_head():
    config = from_ouro_config({**PUBLISHED, "num_key_value_heads": 4, "tie_word_embeddings": True})
    assert (config.kv_heads, config.tied_head) == (4, True)


def test_the_rotary_base_as_transformers_5_writes_it():
    values = {name: value for name, value in PUBLISHED.items() if name not in ("rope_theta", "rope_scaling")}
    config = from_ouro_config({**values, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert config.rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; only 'ouro' can be read here"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling={'rope_type': 'yarn', 'factor': 4.0}"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}}, "rope_parameters="),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported, only False"),
        ({"sliding_window": 4096, "use_sliding_window": None}, "sliding_window=4096 is not supported, only None"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types must be 'full_attention' for each of the 24 layers"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"early_exit_threshold": 0.5}, "early_exit_threshold=0.5 is not kept in a model.*--exit q="),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}: quantized weights cannot be read"),
        ({"compression_config": {}}, "compression_config={}: quantized weights cannot be read"),
        ({"early_exit_step": 2}, "early_exit_step=2 is not kept in a model.*--exit loops="),
        ({"is_causal": False}, "is_causal=False is not supported, only True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.* is not supported, only the default"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not supported, only the default"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters=.* is not supported"),
        ({"rope_parameters": {"rope_theta": "large"}}, "rope_theta must be a number from above 0"),
        ({"attention_chunk_size": 64}, "field 'attention_chunk_size' is not supported; remove it if the model"),
        ({"residual_multiplier": 0.2}, "field 'residual_multiplier' is not supported; remove it if the model"),
        ({"num_layer": 3}, "field 'num_layer' is not supported; remove it if the model"),
        ({"hiden_size": 3}, "field 'hiden_size' is not supported; did you mean 'hidden_size'"),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"hidden_size": "2048"}, "hidden_size must be a whole number from above 0 to 2147483647, not '2048'"),
        ({"num_hidden_layers": 10**40}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, not 'no'"),
        ({"num_key_value_heads": 3}, "config.json: model.num_kv_heads=3 does not divide"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        from_ouro_config({**PUBLISHED, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation_autoset": True, "_commit_hash": "0", "_name_or_path": "x", "_from_model_config": True},
        {"unsloth_version": "2025.11", "unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"}},
        {"chunk_size": 64, "early_exit_step": None, "is_causal": True, "quantization_config": None},
        {"output_hidden_states": False, "return_dict": True, "torchscript": False, "id2label": {"0": "LABEL_0"}},
        {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "max_length": 20, "pad_token_id": -1},
        {"dtype": "bfloat16", "torch_dtype": None, "attn_implementation": "sdpa", "gradient_checkpointing": False},
        {"attention_bias": None, "mlp_bias": False, "qkv_bias": False, "final_logit_softcapping": None},
        {"use_sliding_window": False, "sliding_window": 4096},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_others_note_for_themselves_changes_nothing(fields):
    assert from_ouro_config({**PUBLISHED, **fields}) == explicit(ouro_1_4b())


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"type": "default"},
        {"rope_type": "default", "type": "default", "factor": 1.0},
        {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0, "attention_factor": None},
        {"type": "linear", "factor": 1.0},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e6}},
    ],
    ids=str,
)
def test_every_spelling_of_the_plain_rotary_embedding_is_read(name, rope):
    assert from_ouro_config({**PUBLISHED, name: rope}) == explicit(ouro_1_4b())


@pytest.mark.transformers
def test_every_field_that_transformers_writes_of_itself_is_read():
    transformers = pytest.importorskip("transformers")
    plain = transformers.PretrainedConfig(tie_word_embeddings=False).to_dict()
    ours = {name: value for name, value in plain.items() if name != "model_type"}
    assert from_ouro_config({**PUBLISHED, **ours}) == explicit(ouro_1_4b())


@pytest.mark.parametrize(
    "name",
    ["early_exit_steps_done", "chunk_sizes", "hidden_states", "norm_eps", "max_window", "rope_base"],
)
def test_another_field_is_not_taken_for_a_misspelled_one(name):
    """A user who follows such a suggestion renames a field, which would put an unrelated value into the model."""
    with pytest.raises(UserError, match=f"field '{name}' is not supported; remove it"):
        from_ouro_config({**PUBLISHED, name: 7})


@pytest.mark.parametrize("name", ["hiden_size", "num_hidden_layer", "rope_tehta", "tie_word_embedding", "head_dims"])
def test_a_misspelled_field_is_corrected(name):
    with pytest.raises(UserError, match=f"field '{name}' is not supported; did you mean '"):
        from_ouro_config({**PUBLISHED, name: 7})


def test_a_llama_has_the_shape_of_a_looped_model():
    config = from_llama_config(LLAMA, loops=3, norm_placement=NormPlacement.PRE)
    assert config == dataclasses.replace(explicit(ouro_1_4b()), loops=3, norm_placement=NormPlacement.PRE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prelude_layers": 1}, "cannot express model.prelude_layers=1"),
        ({"coda_layers": 2}, "cannot express model.coda_layers=2"),
        ({"injection": Injection.ADD}, "cannot express model.injection=add"),
        ({"norm_placement": NormPlacement.PRE}, "cannot express model.norm_placement=pre"),
        ({"qk_bias": True}, "cannot express model.qk_bias=True"),
        ({"embedding_scale": 2.0}, "cannot express model.embedding_scale=2.0"),
        ({"residual": Residual.PER_LOOP}, "cannot express model.residual=per_loop"),
        ({"state_norm": StateNorm.READOUT}, "cannot express model.state_norm=readout"),
        ({"time_signal": TimeSignal.SINUSOID}, "cannot express model.time_signal=sinusoid"),
        ({"position_signal": PositionSignal.SINUSOID}, "cannot express model.position_signal=sinusoid"),
        ({"gate": GatePlacement.NONE}, "cannot express model.gate=none"),
    ],
)
def test_what_hugging_face_cannot_express_is_refused(changes, message):
    model = ModelConfig(vocab_size=8, width=8, mlp_width=8, num_layers=1, num_heads=1, **changes)
    with pytest.raises(UserError, match=message):
        to_ouro_config(model, dtype="float32")
