import dataclasses

import pytest

from looplm_jax.config import Injection, ModelConfig, NormPlacement
from looplm_jax.convert.ouro_config import from_llama_config, from_ouro_config, to_ouro_config
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
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] is not honoured here"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not honoured here, only False"),
        ({"sliding_window": 4096}, "sliding_window=4096 is not honoured here, only None"),
        ({"layer_types": ["sliding_attention"] * 24}, "layer_types must be 'full_attention' for each of the 24 layers"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not honoured here, only 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not honoured"),
        ({"attention_bias": True}, "attention_bias=True is not honoured"),
        ({"early_exit_threshold": 0.5}, "early_exit_threshold=0.5 is not kept in a model.*--exit q="),
        ({"quantization_config": {}}, "field 'quantization_config' is not honoured here; remove it"),
        ({"hiden_size": 3}, "field 'hiden_size' is not honoured here; did you mean 'hidden_size'"),
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
    ],
)
def test_what_hugging_face_cannot_express_is_refused(changes, message):
    model = ModelConfig(vocab_size=8, width=8, mlp_width=8, num_layers=1, num_heads=1, **changes)
    with pytest.raises(UserError, match=message):
        to_ouro_config(model, dtype="float32")
