"""Converts the `config.json` of a Huginn folder (arXiv 2502.05171) to a ModelConfig and back.

Fields that would change what the model computes are refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from looplm_jax.config import ModelConfig, NormPlacement
from looplm_jax.convert._ouro_config import (
    BOOKKEEPING,
    MISSPELLED,
    OF_TRANSFORMERS,
    WITHOUT_EFFECT,
    read_number,
    shown,
)
from looplm_jax.errors import UserError, suggest
from looplm_jax.models.presets import huginn

MODEL_TYPE = "huginn_raven"

# Field of `config.json` -> argument of `presets.huginn`.
_SIZES = {
    "vocab_size": "vocab_size",
    "n_embd": "width",
    "intermediate_size": "mlp_width",
    "n_heads": "num_heads",
    "n_layers_in_prelude": "prelude_layers",
    "n_layers_in_recurrent_block": "num_layers",
    "n_layers_in_coda": "coda_layers",
    "mean_recurrence": "loops",
    "block_size": "max_positions",
}
_ROPE_BASE, _NORM_EPS = 50000.0, 1e-6  # where the fields are missing

# Fields that change what the model computes: only these values are supported.
_ONLY: dict[str, Any] = {
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "init_strategy": "takase",
    "init_orthogonal": False,
    "bias": False,
    "qk_bias": True,
    "tie_embeddings": True,
    "tie_word_embeddings": True,
    "test_time_noise": 0,
}
# Fields for training, or without effect where `test_time_noise` is 0.
_OF_TRAINING = {
    "sampling_scheme",
    "mean_backprop_depth",
    "test_time_noise_type",
    "padding_multiple",
    "effective_expected_depth",
    "init_values",
}


def from_huginn_config(values: Mapping[str, Any]) -> ModelConfig:
    """Returns the model that a Huginn `config.json` describes.

    Raises:
      UserError: a field is missing, of the wrong type, or not supported; the message names it.
    """
    values = {name: value for name, value in values.items() if value is not None}
    derived = {"head_dim", "num_key_value_heads", "n_layers", "padded_vocab_size", "num_hidden_layers"}
    known = {*_SIZES, *_ONLY, *derived, "rope_base", "norm_eps", "model_type"}
    for name in values:
        if name not in known | _OF_TRAINING | WITHOUT_EFFECT | OF_TRANSFORMERS and not name.startswith(BOOKKEEPING):
            hint = suggest(name, known, otherwise="; remove it if the model is the same without", cutoff=MISSPELLED)
            raise UserError(f"config.json: field {shown(name)} is not supported{hint}")
    for name, only in _ONLY.items():
        if values.get(name, only) != only:
            raise UserError(f"config.json: {name}={shown(values[name])} is not supported, only {only!r}")

    sizes: dict[str, Any] = {ours: read_number(name, values.get(name), whole=True) for name, ours in _SIZES.items()}
    try:
        config = dataclasses.replace(
            huginn(**sizes),
            rope_theta=read_number("rope_base", values.get("rope_base", _ROPE_BASE), whole=False),
            norm_eps=read_number("norm_eps", values.get("norm_eps", _NORM_EPS), whole=False),
        )
    except UserError as error:
        raise UserError(f"config.json: {error}") from None

    for name, value in _derived(config).items():
        if values.get(name, value) != value:
            raise UserError(f"config.json: {name}={shown(values[name])} contradicts other fields, which give {value}")
    return config


def is_huginn(config: ModelConfig) -> bool:
    """Whether a model is to be written for Huginn's code: norms of the sum distinguish it from an Ouro."""
    return config.norm_placement is NormPlacement.OUTER


def to_huginn_config(config: ModelConfig, *, dtype: str) -> dict[str, Any]:
    """Returns the published fields of `config.json` for a model whose weights are saved in `dtype`.

    Raises:
      UserError: the model has an option that Huginn's code cannot express; the message names it.
    """
    sizes: dict[str, Any] = {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    published = huginn(**{ours: sizes[theirs] for theirs, ours in _SIZES.items()})
    # These determine only initial values, or are fields of `config.json`.
    free = {name: getattr(config, name) for name in ("initializer", "init_std", "rope_theta", "norm_eps")}
    expected = dataclasses.replace(published, **free)
    # 0 stands for a default that depends on other fields.
    own = dataclasses.replace(
        config,
        num_kv_heads=0 if config.kv_heads == config.num_heads else config.num_kv_heads,
        head_dim=0 if config.head_width * config.num_heads == config.width else config.head_dim,
    )
    for field in dataclasses.fields(ModelConfig):
        value, needed = getattr(own, field.name), getattr(expected, field.name)
        if value != needed:
            value, needed = (getattr(each, "value", each) for each in (value, needed))
            raise UserError(f"Huginn's code cannot express model.{field.name}={value}, only {needed}; keep our format")

    return {
        "architectures": ["RavenForCausalLM"],
        "model_type": MODEL_TYPE,
        # The classes of the Python files that the export copies into the folder.
        "auto_map": {
            "AutoConfig": "configuration_huginn.RavenConfig",
            "AutoModelForCausalLM": "modeling_huginn.RavenForCausalLM",
        },
        **sizes,
        **_derived(config),
        **_ONLY,
        "mean_backprop_depth": min(8, config.loops),
        "sampling_scheme": "poisson-lognormal-filling",
        "rope_base": config.rope_theta,
        "norm_eps": config.norm_eps,
        "torch_dtype": dtype,
    }


def _derived(config: ModelConfig) -> dict[str, int]:
    """Returns the fields that follow from others."""
    return {
        "head_dim": config.head_width,
        "num_key_value_heads": config.kv_heads,
        "n_layers": config.prelude_layers + config.num_layers + config.coda_layers,
        "padded_vocab_size": config.vocab_size,
    }
