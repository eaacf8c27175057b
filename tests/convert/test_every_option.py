"""Every option of a model survives a conversion to Hugging Face's fields and back, or is refused by name."""

import dataclasses
import enum

import pytest

from looplm_jax.config import (
    GatePlacement,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)
from looplm_jax.convert._huginn_config import from_huginn_config, to_huginn_config
from looplm_jax.convert._ouro_config import from_ouro_config, to_ouro_config
from looplm_jax.errors import UserError
from looplm_jax.models.presets import huginn, tiny

HUGINN = huginn(
    vocab_size=97,
    width=32,
    mlp_width=48,
    num_heads=4,
    num_layers=2,
    prelude_layers=1,
    coda_layers=1,
    loops=3,
    max_positions=64,
)
OTHER_NUMBERS = {
    "vocab_size": 96,
    "width": 64,
    "mlp_width": 40,
    "num_layers": 3,
    "num_heads": 8,
    "num_kv_heads": 1,
    "head_dim": 6,
    "loops": 5,
    "prelude_layers": 2,
    "coda_layers": 2,
    "state_std": 0.25,
    "gate_bias": -3.0,
    "max_loops": 9,
    "rope_theta": 2e4,
    "second_norm_init": 0.1,
    "norm_eps": 1e-5,
    "embedding_scale": 3.0,
    "max_positions": 32,
    "init_std": 0.3,
}
# What else an option needs to be valid.
NEEDED = {
    "injection_norm": {"injection": Injection.ADD},
    InitialState.ZERO: {"injection": Injection.ADD},
    InitialState.NOISE: {"injection": Injection.ADD},
    Injection.QUERY: {"initial_state": InitialState.EMBEDDED},
    Injection.NONE: {"initial_state": InitialState.EMBEDDED},
    "state_std": {"injection": Injection.ADD, "initial_state": InitialState.NOISE},
    "shared_readout_norm": {"coda_layers": 1, "state_norm": StateNorm.READOUT},
    "gate_bias": {"gate": GatePlacement.AFTER},
    "max_loops": {"time_signal": TimeSignal.LEARNED},
    PositionSignal.SINUSOID: {"prelude_layers": 0},
    "second_norm_init": {"norm_placement": NormPlacement.SANDWICH},
    Residual.DEEP_LOOP: {"norm_placement": NormPlacement.OUTER},
}
# `config.json` need not hold what determines only initial values.
INITIAL_VALUES = ("initializer", "init_std", "second_norm_init", "gate_bias")


def others(base, name):
    """Returns all other values of an option, or one if it is a number."""
    value = getattr(base, name)
    if isinstance(value, enum.Enum):
        return [other for other in type(value) if other is not value]
    return [not value] if isinstance(value, bool) else [OTHER_NUMBERS[name]]


def variants(base):
    """Yields the name of each option, and changes of a valid model: another value, and what this value needs."""
    for field in dataclasses.fields(ModelConfig):
        for value in others(base, field.name):
            changes = NEEDED.get(field.name, {}) | NEEDED.get(value if isinstance(value, enum.Enum) else None, {})
            if field.name == "width" and base.embedding_scale != 1:
                changes["embedding_scale"] = value**0.5
            yield field.name, {**changes, field.name: value}


def without_initial_values(config):
    """Returns the fields that the model computes with; 0 heads or width of a head stand for a default."""
    fields = {**vars(config), "num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    return {name: value for name, value in fields.items() if name not in INITIAL_VALUES}


@pytest.mark.parametrize(
    ("base", "write", "read", "refusal"),
    [
        (tiny(), to_ouro_config, from_ouro_config, "Hugging Face's Ouro cannot express "),
        (HUGINN, to_huginn_config, from_huginn_config, "Huginn's code cannot express "),
    ],
    ids=["ouro", "huginn"],
)
def test_every_option_is_converted_or_refused_by_name(base, write, read, refusal):
    converted, refused = set(), set()
    for option, changes in variants(base):
        model = dataclasses.replace(base, **changes)
        try:
            values = write(model, dtype="float32")
        except UserError as error:
            message = str(error)
            assert message.startswith(tuple(f"{refusal}model.{name}=" for name in changes)), (changes, message)
            assert message.endswith("; keep our format")
            refused.add(option)
        else:
            assert without_initial_values(read(values)) == without_initial_values(model), changes
            converted.add(option)

    assert {"loops", "rope_theta", "norm_eps", "max_positions", "mlp_width", "init_std"} <= converted
    assert {"residual", "time_signal", "position_signal", "injection_norm", "gate", "state_norm"} <= refused - converted
