"""The `config.json` of a Hugging Face folder to our ModelConfig and back. What we do not honour is refused by name."""

from collections.abc import Mapping
from typing import Any

from looplm_jax.config import Injection, ModelConfig, NormPlacement
from looplm_jax.errors import UserError, suggest

ARCHITECTURE = "OuroForCausalLM"
_LARGEST = 2**31 - 1

# Their field -> ours. Those that a file may leave out have the value that transformers assumes.
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

# Fields that change what the model computes: only these values are what we compute.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_dropout": (0,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "sliding_window": (None,),
    "partial_rotary_factor": (1,),
    "rope_interleaved": (False,),
    "pretraining_tp": (1,),
}
# Fields that say nothing about what the model computes, or that the tokenizer and the weights say better.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "entropy_weight",
    "eos_token_id",
    "is_llama_config",
    "max_window_layers",
    "pad_token_id",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
}
_CHECKED = {
    "model_type",
    "tie_word_embeddings",
    "early_exit_threshold",
    "layer_types",
    "rope_scaling",
    "rope_parameters",
}


def from_ouro_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a `config.json` of Ouro describes.

    Raises:
      UserError: another kind of model, a field that is missing or of the wrong type, or one that we do not honour.
    """
    if values.get("early_exit_threshold", 1) != 1:
        raise UserError(
            f"config.json: early_exit_threshold={_brief(values['early_exit_threshold'])} is not kept in a model; "
            "set it to 1.0 and choose the exit when generating, with --exit q=..."
        )
    return _model(values, "ouro", norm_placement=NormPlacement.SANDWICH)


def from_llama_config(values: Mapping[str, Any], *, loops: int, norm_placement: NormPlacement) -> ModelConfig:
    """A looped model of the shape of a dense one, from the `config.json` of a Llama.

    Raises:
      UserError: another kind of model, a field that is missing or of the wrong type, or one that we do not honour.
    """
    return _model({**values, "total_ut_steps": loops}, "llama", norm_placement=norm_placement)


def to_ouro_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """The published fields of `config.json` for a model of ours whose weights are saved in `dtype`.

    Raises:
      UserError: an option that Hugging Face's Ouro cannot express, by name.
    """
    unsupported = {
        "prelude_layers": config.prelude_layers == 0,
        "coda_layers": config.coda_layers == 0,
        "injection": config.injection is Injection.NONE,
        "norm_placement": config.norm_placement is NormPlacement.SANDWICH,
    }
    for name, fits in unsupported.items():
        if not fits:
            value = getattr(config, name)
            raise UserError(
                f"Hugging Face's Ouro cannot express model.{name}={getattr(value, 'value', value)}; keep our format"
            )
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "ouro",
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


def _model(values: Mapping[str, Any], model_type: str, norm_placement: NormPlacement) -> ModelConfig:
    if values.get("model_type") != model_type:
        raise UserError(
            f"config.json: model_type is {_brief(values.get('model_type'))}; only {model_type!r} can be read here"
        )
    _refuse_unknown(values)
    _refuse_other_values(values)
    values = {**values, "rope_theta": _rope_theta(values)}
    fields: dict[str, Any] = {}
    for theirs, ours in (_WHOLE_NUMBERS | _NUMBERS).items():
        value = values.get(theirs)
        if value is None and theirs in _MAY_BE_LEFT_OUT:
            continue
        fields[ours] = _number(theirs, value, whole=theirs in _WHOLE_NUMBERS)
    _refuse_other_layers(values, fields["num_layers"])
    tied = values.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"config.json: tie_word_embeddings must be true or false, not {_brief(tied)}")
    try:
        return ModelConfig(**fields, tied_head=tied, norm_placement=norm_placement)
    except UserError as error:
        raise UserError(f"config.json: {error}") from None


def _number(name: str, value: Any, *, whole: bool) -> int | float:
    if value is None:
        raise UserError(f"config.json: field {name} is missing")
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= _LARGEST:  # NaN is not above 0
        wanted = "a whole number" if whole else "a number"
        raise UserError(f"config.json: {name} must be {wanted} from above 0 to {_LARGEST}, not {_brief(value)}")
    return value if whole else float(value)


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    known = {*_WHOLE_NUMBERS, *_NUMBERS, *_ONLY, *_WITHOUT_EFFECT, *_CHECKED}
    for name in values:
        if name not in known:
            hint = suggest(name, known, otherwise="; remove it if the model is the same without")
            raise UserError(f"config.json: field {_brief(name)} is not honoured here{hint}")


def _refuse_other_values(values: Mapping[str, Any]) -> None:
    for name, allowed in _ONLY.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"config.json: {name}={_brief(values[name])} is not honoured here, only {allowed[0]!r}")
    scaling = values.get("rope_scaling")
    if scaling is not None and scaling != {"rope_type": "default"}:
        raise UserError(f"config.json: rope_scaling={_brief(scaling)} is not honoured here, only null")


def _refuse_other_layers(values: Mapping[str, Any], num_layers: int) -> None:
    kinds = values.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind != "full_attention" for kind in kinds):
        raise UserError(f"config.json: layer_types must be 'full_attention' for each of the {num_layers} layers")


def _rope_theta(values: Mapping[str, Any]) -> Any:
    """The base of the rotary embedding; transformers 5 moved it into `rope_parameters`."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        return values.get("rope_theta")
    if not isinstance(parameters, dict) or {**parameters, "rope_theta": 0} != {"rope_type": "default", "rope_theta": 0}:
        raise UserError(
            f"config.json: rope_parameters={_brief(parameters)} is not honoured here, only the default type"
        )
    return parameters.get("rope_theta", values.get("rope_theta"))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
