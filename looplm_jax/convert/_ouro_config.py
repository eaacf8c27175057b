"""Converts the `config.json` of a Hugging Face folder to a ModelConfig and back.

Fields that looplm_jax does not support are refused by name.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from looplm_jax.config import ModelConfig, NormPlacement
from looplm_jax.errors import UserError, suggest

ARCHITECTURE = "OuroForCausalLM"
# Larger numbers are mistakes, and would overflow the integers of devices.
_LARGEST = 2**31 - 1

# Field of `config.json` -> field of ModelConfig. Omitted optional fields take the value that transformers assumes.
_WHOLE_NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
    "total_ut_steps": "loops",
}
_NUMBERS = {"rope_theta": "rope_theta", "rms_norm_eps": "norm_eps", "initializer_range": "init_std"}
_MAY_BE_LEFT_OUT = {"num_key_value_heads", "head_dim", "initializer_range"}

# Fields that change what the model computes: only these values are supported.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "rope_type": ("default",),
    "pretraining_tp": (1,),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
}
# Fields that do not affect the computation, or that the tokenizer and the weights state more reliably.
WITHOUT_EFFECT = {
    "architectures",
    "auto_map",
    "chunk_size",
    "dtype",
    "entropy_weight",
    "gradient_checkpointing",
    "is_llama_config",
    "max_window_layers",
    "torch_dtype",
    "use_cache",
    "use_flash_attn",
}
# Fields of transformers' PretrainedConfig, which any config may hold: bookkeeping, outputs, defaults of `generate`.
OF_TRANSFORMERS = {
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "use_bfloat16",
}
BOOKKEEPING = ("_", "unsloth_", "transformers.js_")  # prefixes of fields that libraries write for their own use
_CHECKED = {
    "model_type",
    "tie_word_embeddings",
    "early_exit_threshold",
    "early_exit_step",
    "layer_types",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
}
_QUANTIZED = ("quantization_config", "compression_config")
# Fields of ModelConfig that `config.json` holds, or that only determine initial values.
_EXPRESSED = {
    *_WHOLE_NUMBERS.values(),
    *_NUMBERS.values(),
    "tied_head",
    "initializer",
    "second_norm_init",
    "gate_bias",
}
MISSPELLED = 0.85  # the similarity (difflib) above which one name counts as a misspelling of another


# Reading


def from_ouro_config(values: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that an Ouro `config.json` describes.

    Raises:
      UserError: the file describes another kind of model, or a field is missing, of the wrong type, or not supported.
    """
    if values.get("early_exit_step") is not None:
        raise UserError(
            f"config.json: early_exit_step={shown(values['early_exit_step'])} is not kept in a model; "
            "remove it and choose the loop when generating, with --exit loops=..."
        )

    # 1 means that no token exits early, as in our models.
    if values.get("early_exit_threshold", 1) != 1:
        raise UserError(
            f"config.json: early_exit_threshold={shown(values['early_exit_threshold'])} is not kept in a model; "
            "set it to 1.0 and choose the exit when generating, with --exit q=..."
        )

    return _model(values, "ouro", norm_placement=NormPlacement.SANDWICH)


def from_llama_config(values: Mapping[str, Any], *, loops: int, norm_placement: NormPlacement) -> ModelConfig:
    """Returns the looped model that has the shape of a dense one, from a Llama `config.json`.

    Raises:
      UserError: the file describes another kind of model, or a field is missing, of the wrong type, or not supported.
    """
    return _model({**values, "total_ut_steps": loops}, "llama", norm_placement=norm_placement)


# Writing


def to_ouro_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Returns the published fields of `config.json` for a model whose weights are saved in `dtype`.

    Raises:
      UserError: the model has an option that Hugging Face's Ouro cannot express; the message names it.
    """
    check_is_ouro(config)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "ouro",
        # The classes of the Python files that the export copies into the folder.
        "auto_map": {
            "AutoConfig": "configuration_looplm.OuroConfig",
            "AutoModel": "modeling_looplm.OuroModel",
            "AutoModelForCausalLM": f"modeling_looplm.{ARCHITECTURE}",
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_positions,
        "total_ut_steps": config.loops,
        # No token exits early unless a call asks for it.
        "early_exit_threshold": 1.0,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_head,
        "layer_types": ["full_attention"] * config.num_layers,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_layers,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def check_is_ouro(config: ModelConfig, *, except_for: Collection[str] = ()) -> None:
    """Raises UserError if a field of the model has a value that Hugging Face's Ouro cannot express; names the field.

    Options without parameters, such as the weights of residual sums, have no tensor whose absence would show.
    """
    for field in dataclasses.fields(ModelConfig):
        value = getattr(config, field.name)
        # The defaults are Ouro's.
        if field.name not in {*_EXPRESSED, *except_for} and value != field.default:
            chosen = getattr(value, "value", value)
            raise UserError(f"Hugging Face's Ouro cannot express model.{field.name}={chosen}; keep our format")


# Fields and their checks


def _model(values: Mapping[str, Any], model_type: str, norm_placement: NormPlacement) -> ModelConfig:
    """Returns the model that the fields describe, after checking all of them."""
    values = {name: value for name, value in values.items() if value is not None}  # null means that the field is absent

    if values.get("model_type") != model_type:
        raise UserError(
            f"config.json: model_type is {shown(values.get('model_type'))}; only {model_type!r} can be read here"
        )

    # Unknown fields come first: one of them may be a misspelled field, which would otherwise be reported as missing.
    _refuse_unknown(values)
    _refuse_other_values(values)

    values = {**values, "rope_theta": _rope_theta(values)}
    fields: dict[str, Any] = {}
    for theirs, ours in (_WHOLE_NUMBERS | _NUMBERS).items():
        value = values.get(theirs)
        if value is None and theirs in _MAY_BE_LEFT_OUT:
            continue
        fields[ours] = read_number(theirs, value, whole=theirs in _WHOLE_NUMBERS)

    _refuse_other_layers(values, fields["num_layers"])
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings must be true or false, not {shown(tied)}")

    try:
        return ModelConfig(**fields, tied_head=tied, norm_placement=norm_placement)
    except UserError as error:
        raise UserError(f"config.json: {error}") from None


def read_number(name: str, value: Any, *, whole: bool) -> int | float:
    """Returns a positive number. Raises UserError if the field is missing or has another type."""
    if value is None:
        raise UserError(f"config.json: field {name} is missing")
    # JSON has one type of number, but Python reads 4 and 4.0 as different types.
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= _LARGEST:  # a NaN is not above 0
        wanted = "a whole number" if whole else "a number"
        raise UserError(f"config.json: {name} must be {wanted} from above 0 to {_LARGEST}, not {shown(value)}")
    return value if whole else float(value)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    """Raises UserError for quantized weights, and for fields that are not known."""
    for name in _QUANTIZED:
        if name in values:
            raise UserError(
                f"config.json: {name}={shown(values[name])}: quantized weights cannot be read; "
                "take the folder that they were made from"
            )

    # Only names that have an effect are suggested.
    known = {*_WHOLE_NUMBERS, *_NUMBERS, *_ONLY, *_CHECKED}

    for name in values:
        if name not in known | WITHOUT_EFFECT | OF_TRANSFORMERS and not name.startswith(BOOKKEEPING):
            otherwise = "; remove it if the model is the same without"
            hint = suggest(name, known, otherwise=otherwise, cutoff=MISSPELLED)
            raise UserError(f"config.json: field {shown(name)} is not supported{hint}")


def _refuse_other_values(values: Mapping[str, Any]) -> None:
    """Raises UserError for values that would change what the model computes."""
    for name, allowed in _ONLY.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"config.json: {name}={shown(values[name])} is not supported, only {allowed[0]!r}")

    # Configurations may state a window and disable it; a missing flag counts as enabled.
    window = values.get("sliding_window")
    if window is not None and values.get("use_sliding_window") is not False:
        raise UserError(f"config.json: sliding_window={shown(window)} is not supported, only None")

    for name in ("rope_scaling", "rope_parameters"):
        if name in values and not _is_default_rope(values[name]):
            raise UserError(f"config.json: {name}={shown(values[name])} is not supported, only the default type")


def _is_default_rope(rope: Any) -> bool:
    """Whether these rotary settings, in any spelling, change nothing except the base."""
    if not isinstance(rope, dict):
        return False
    rope = {name: value for name, value in _of_full_attention(rope).items() if value is not None}

    # Older configurations call this field "type".
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)
    # Without scaling, the original length has no effect; the base is read by _rope_theta.
    for unread in ("rope_theta", "original_max_position_embeddings"):
        rope.pop(unread, None)

    ones = {"factor", "attention_factor", "partial_rotary_factor"}
    # A linear scaling by 1 is no scaling.
    is_plain = kind == "default" or (kind == "linear" and "factor" in rope)
    return is_plain and rope.keys() <= ones and all(value == 1 for value in rope.values())


def _of_full_attention(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the rotary settings; transformers 5 may nest them under the type of layer."""
    return rope["full_attention"] if isinstance(rope.get("full_attention"), dict) and len(rope) == 1 else rope


def _refuse_other_layers(values: Mapping[str, Any], num_layers: int) -> None:
    """Raises UserError unless every layer uses full attention."""
    # Configurations of models that mix full and sliding attention list the kind of each layer.
    kinds = values.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"config.json: layer_types must be 'full_attention' for each of the {num_layers} layers")


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """Returns the base of the rotary embedding, which transformers 5 moved to `rope_parameters`."""
    for name in ("rope_parameters", "rope_scaling"):
        theta = _of_full_attention(values.get(name) or {}).get("rope_theta")
        if theta is not None:
            return theta
    return values.get("rope_theta")


def shown(value: Any) -> str:
    """Returns a value of a file as text of bounded length, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
