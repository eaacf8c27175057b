"""Every configuration validates itself, with a one-line error."""

import dataclasses

import pytest

from looplm_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    GatePlacement,
    GuardConfig,
    InitialState,
    Injection,
    MeshConfig,
    ModelConfig,
    NormPlacement,
    Objective,
    OptimizerConfig,
    PositionSignal,
    PriorConfig,
    ReadLimits,
    Recipe,
    Residual,
    Schedule,
    SourceConfig,
    Stage,
    TimeSignal,
    help_text,
)
from looplm_jax.errors import UserError, suggest

REQUIRED = {
    ModelConfig: {"vocab_size": 11, "width": 12, "mlp_width": 8, "num_layers": 1, "num_heads": 2},
    Stage: {"name": "main", "steps": 10, "batch_size": 4, "sequence_length": 8},
    SourceConfig: {"path": "x.txt"},
}
REQUIRED[Recipe] = {
    "name": "r",
    "model": ModelConfig(**REQUIRED[ModelConfig], max_positions=16),
    "stages": (Stage(**REQUIRED[Stage]),),
}
ALL = [
    *REQUIRED,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    MeshConfig,
    OptimizerConfig,
    PriorConfig,
    ReadLimits,
]


def make(kind, **changes):
    return kind(**{**REQUIRED.get(kind, {}), **changes})


@pytest.mark.parametrize("kind", ALL)
def test_configurations_are_frozen_keyword_only_and_hashable(kind):
    config = make(kind)
    assert hash(config) == hash(make(kind))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(kind)[0].name, 1)
    with pytest.raises(TypeError):
        kind(1)


@pytest.mark.parametrize("kind", ALL)
def test_every_plain_field_says_what_it_is(kind):
    for field in dataclasses.fields(kind):
        nested = dataclasses.is_dataclass(getattr(make(kind), field.name)) or field.name == "stages"
        assert nested or help_text(field), field.name


WRONG = [
    *((ModelConfig, {name: 0}, f"model.{name} must be at least 1, not 0") for name in REQUIRED[ModelConfig]),
    (ModelConfig, {"max_positions": 0}, "model.max_positions must be at least 1, not 0"),
    *(
        (ModelConfig, {name: -1}, f"model.{name} must not be negative, not -1")
        for name in ("num_kv_heads", "head_dim", "prelude_layers", "coda_layers")
    ),
    (ModelConfig, {"loops": 0}, "model.loops must be at least 1, not 0"),
    (ModelConfig, {"norm_eps": 0.0}, "model.norm_eps must be positive, not 0.0"),
    (
        ModelConfig,
        {"num_heads": 5},
        "model.num_heads=5 does not divide model.width=12; change one of them, or set model.head_dim",
    ),
    (ModelConfig, {"num_heads": 4}, "model.head_dim must be even for rotary embedding, not 3"),
    (ModelConfig, {"num_kv_heads": 4}, "model.num_kv_heads=4 does not divide model.num_heads=2"),
    (ComputeConfig, {"loss_chunk": 0}, "compute.loss_chunk must be at least 1, not 0"),
    (MeshConfig, {"fsdp": 0}, "mesh.fsdp must be at least 1, or -1 for all that are left, not 0"),
    (MeshConfig, {"tensor": -2}, "mesh.tensor must be at least 1, or -1 for all that are left, not -2"),
    (MeshConfig, {"fsdp": -1}, "only one axis of mesh may be -1"),
    (MeshConfig, {"context": 0}, "mesh.context must be at least 1, or -1 for all that are left, not 0"),
    (OptimizerConfig, {"b1": 1.0}, "optimizer.b1 must be in [0, 1), not 1.0"),
    (OptimizerConfig, {"b2": -0.1}, "optimizer.b2 must be in [0, 1), not -0.1"),
    (OptimizerConfig, {"eps": 0.0}, "optimizer.eps must be positive, not 0.0"),
    (OptimizerConfig, {"clip_norm": 0.0}, "optimizer.clip_norm must be positive, not 0.0"),
    (OptimizerConfig, {"weight_decay": -1.0}, "optimizer.weight_decay must not be negative, not -1.0"),
    (SourceConfig, {"path": ""}, "a data source needs a path"),
    (SourceConfig, {"weight": 0.0}, "the weight of source 'x.txt' must be positive, not 0.0"),
    (DataConfig, {"validation_fraction": 1.0}, "data.validation_fraction must be in [0, 1), not 1.0"),
    (PriorConfig, {"rate": 1.0}, "prior.rate must be in (0, 1), not 1.0"),
    (PriorConfig, {"mean": 1.0}, "prior.mean must exceed 1 loop, not 1.0"),
    (PriorConfig, {"sigma": 0.0}, "prior.sigma must be positive, not 0.0"),
    (Stage, {"name": ""}, "a stage needs a name without dots, not ''"),
    (Stage, {"name": "a.b"}, "a stage needs a name without dots, not 'a.b'"),
    *(
        (Stage, {name: 0}, f"stages.main.{name} must be at least 1, not 0")
        for name in ("steps", "batch_size", "sequence_length", "accumulation", "loops")
    ),
    (Stage, {"accumulation": 3}, "stages.main.accumulation=3 does not divide stages.main.batch_size=4"),
    (Stage, {"min_loops": 5}, "stages.main.min_loops must be in 0..4, not 5"),
    (Stage, {"min_loops": -1}, "stages.main.min_loops must be in 0..4, not -1"),
    (Stage, {"context": -1}, "stages.main.context must not be negative, not -1"),
    (Stage, {"beta": -0.1}, "stages.main.beta must not be negative, not -0.1"),
    (Stage, {"learning_rate": 0.0}, "stages.main.learning_rate must be positive, not 0.0"),
    (
        Stage,
        {"warmup_steps": 6, "decay_steps": 5},
        "stages.main: warmup_steps and decay_steps must fit in steps=10",
    ),
    *(
        (Stage, {name: -1}, f"stages.main.{name} must not be negative, not -1")
        for name in ("warmup_steps", "decay_steps", "final_learning_rate", "rope_theta")
    ),
    (Stage, {"gain_slope": -3.0}, "stages.main.gain_slope must be positive, not -3.0"),
    (
        Stage,
        {"schedule": Schedule.COSINE, "learning_rate": 1e-3, "final_learning_rate": 5.0},
        "stages.main.final_learning_rate must be at most stages.main.learning_rate=0.001, not 5.0",
    ),
    (
        Stage,
        {"objective": Objective.LAST_LOSS, "trainable": ("gate",)},
        "stages.main.trainable=gate learns nothing from objective=last_loss; choose other groups or objective=gate",
    ),
    (Stage, {"steps": 2.5}, "stages.main.steps must be a whole number, not 2.5"),
    (Stage, {"steps": True}, "stages.main.steps must be a whole number, not True"),
    (Stage, {"objective": "gate"}, "stages.main.objective must be of type Objective, not 'gate'"),
    (Stage, {"trainable": "gate"}, "stages.main.trainable must be a tuple, not 'gate'"),
    (ModelConfig, {"rope_theta": 0.0}, "model.rope_theta must be positive, not 0.0"),
    (ModelConfig, {"init_std": -0.1}, "model.init_std must be positive, not -0.1"),
    (ModelConfig, {"vocab_size": 2**63}, f"model.vocab_size must be below 2**63, not {2**63}"),
    *(
        (ModelConfig, {name: 0.0}, f"model.{name} must be positive, not 0.0")
        for name in ("embedding_scale", "second_norm_init")
    ),
    *((ModelConfig, {name: -1}, f"model.{name} must not be negative, not -1") for name in ("max_loops", "state_std")),
    (
        ModelConfig,
        {"injection_norm": True},
        "model.injection_norm needs an injected input; set model.injection, or model.injection_norm=false",
    ),
    (
        ModelConfig,
        {"initial_state": InitialState.NOISE},
        "model.initial_state=noise without an injection hides the tokens from all loops; set model.injection",
    ),
    (
        ModelConfig,
        {"initial_state": InitialState.ZERO, "injection": Injection.QUERY},
        "model.initial_state=zero is not read with model.injection=query, whose first loop reads the input alone; "
        "set model.initial_state=embedded",
    ),
    (
        ModelConfig,
        {"shared_readout_norm": True},
        "model.shared_readout_norm needs a coda; set model.coda_layers, or model.shared_readout_norm=false",
    ),
    (
        ModelConfig,
        {"width": 13, "head_dim": 2, "time_signal": TimeSignal.SINUSOID},
        "model.width must be even for sinusoids, not 13",
    ),
    (
        ModelConfig,
        {"prelude_layers": 1, "position_signal": PositionSignal.SINUSOID},
        "model.position_signal=sinusoid does not reach the prelude; "
        "set model.prelude_layers=0, or model.position_signal=rotary",
    ),
    (ModelConfig, {"max_loops": 4}, "model.max_loops=4 needs model.time_signal=learned, not none"),
    (
        ModelConfig,
        {"max_loops": 3, "time_signal": TimeSignal.LEARNED},
        "model.max_loops=3 is less than model.loops=4",
    ),
    (
        ModelConfig,
        {"second_norm_init": 0.1, "norm_placement": NormPlacement.OUTER},
        "model.second_norm_init=0.1 needs model.norm_placement=sandwich, not outer",
    ),
    (
        ModelConfig,
        {"residual": Residual.DEEP_LOOP},
        "model.residual=deep_loop needs model.norm_placement=outer, not sandwich",
    ),
    *(
        (
            Recipe,
            {"model": make(ModelConfig, max_positions=16, gate=GatePlacement.NONE), "stages": (stage,)},
            f"stages.main.objective={stage.objective.value} needs an exit gate; "
            "set stages.main.objective=last_loss, or model.gate=after",
        )
        for stage in (make(Stage), make(Stage, objective=Objective.GATE))
    ),
    (
        Recipe,
        {
            "model": make(ModelConfig, max_positions=16, loops=2, time_signal=TimeSignal.LEARNED),
            "stages": (make(Stage, loops=3),),
        },
        "stages.main.loops=3 is beyond the 2 rows of model.time_signal=learned; set model.max_loops=3",
    ),
    (OptimizerConfig, {"clip_norm": 10**400}, f"optimizer.clip_norm must be a finite number, not {10**400}"),
    (ReadLimits, {"record_bytes": 0}, "data.limits.record_bytes must be at least 1, not 0"),
    (ReadLimits, {"window_bytes": 2.5}, "data.limits.window_bytes must be a whole number, not 2.5"),
    (Recipe, {"seed": 2**64}, f"seed must be below 2**63, not {2**64}"),
    (
        Recipe,
        {"stages": (make(Stage, steps=2**31),)},
        f"the stages of recipe 'r' have {2**31} steps together, more than {2**31 - 1}",
    ),
    (
        Stage,
        {"objective": Objective.GATE, "loops": 1},
        "stages.main: the gate has nothing to learn with one loop; set stages.main.loops",
    ),
    (GuardConfig, {"window": 1}, "guard.window must be at least 2, not 1"),
    (GuardConfig, {"sigma": 0.0}, "guard.sigma must be positive, not 0.0"),
    (GuardConfig, {"patience": 0}, "guard.patience must be at least 1, not 0"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every must be at least 1, not 0"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep must be at least 1, not 0"),
    (EvaluationConfig, {"every": -1}, "evaluation.every must not be negative, not -1"),
    (EvaluationConfig, {"sequences": 0}, "evaluation.sequences must be at least 1, not 0"),
    (Recipe, {"stages": ()}, "recipe 'r' needs at least one stage"),
    (
        Recipe,
        {"stages": (make(Stage), make(Stage))},
        "the stages of recipe 'r' need different names, not ['main', 'main']",
    ),
    (Recipe, {"log_every": 0}, "log_every must be at least 1, not 0"),
    (
        Recipe,
        {"stages": (make(Stage, sequence_length=17),)},
        "stages.main.sequence_length=17 is beyond model.max_positions=16",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_impossible_values_are_refused_in_one_line(kind, changes, message):
    with pytest.raises(UserError) as error:
        make(kind, **changes)
    assert str(error.value) == message


FLOATS = [(kind, field.name) for kind in ALL for field in dataclasses.fields(kind) if field.type is float]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "name"), FLOATS)
def test_numbers_are_finite(kind, name, value):
    with pytest.raises(UserError, match=rf"{name} must be a finite number, not {value}"):
        make(kind, **{name: value})


def test_a_rate_may_be_written_as_a_whole_number():
    assert make(Stage, learning_rate=1, final_learning_rate=0).learning_rate == 1


def test_heads_are_filled_in():
    config = make(ModelConfig)
    assert (config.kv_heads, config.head_width) == (2, 6)
    assert make(ModelConfig, num_heads=5, head_dim=4).head_width == 4


def test_filled_in_heads_follow_what_is_replaced():
    config = dataclasses.replace(make(ModelConfig), width=24, num_heads=4)
    assert (config.kv_heads, config.head_width) == (4, 6)
    with pytest.raises(UserError, match="num_heads=5 does not divide"):
        dataclasses.replace(config, num_heads=5)


def test_total_steps_are_those_of_all_stages():
    assert make(Recipe, stages=(make(Stage), make(Stage, name="gate", steps=7))).total_steps == 17


def test_a_close_word_is_suggested_and_otherwise_all_are_listed():
    assert suggest("widht", ["width", "loops"]) == "; did you mean 'width'?"
    assert suggest("zzz", ["width", "loops"]) == "; known: loops, width"
