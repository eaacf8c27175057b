"""Configuration: frozen, keyword-only dataclasses, the single source for Python, the CLI, `--help` and checkpoints.

Every class validates itself on creation. `codec` converts configurations to JSON and back and applies overrides. The
help text of each field is printed by `looplm train --help`. The configurations of the model, its computation, the data
and the stages have modules of their own; all names are those of this module.
"""

import dataclasses
import enum

from looplm_jax._config_compute import (
    AttentionKernel,
    ComputeConfig,
    Dtype,
    Gather,
    MeshConfig,
    Reduce,
    Remat,
    TopologySettings,
)
from looplm_jax._config_data import DataConfig, OnBadRecord, ReadLimits, RecordKind, SourceConfig, sources_like
from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import help_text
from looplm_jax._config_fields import refuse_without_effect as _refuse_without_effect
from looplm_jax._config_fields import require as _require
from looplm_jax._config_loops import (
    DepthConfig,
    DepthKind,
    DepthPer,
    Gradient,
    JacobianNorm,
    JacobianPenalty,
    ReadOut,
    Shortcut,
    Solver,
    SolverKind,
)
from looplm_jax._config_model import (
    GatePlacement,
    Initializer,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)
from looplm_jax._config_objectives import (
    Advantage,
    Aggregation,
    Credit,
    GateTarget,
    LoopRPTConfig,
    LoopWeights,
    PolicyConfig,
    PriorConfig,
    PriorKind,
    Reward,
)
from looplm_jax._config_stage import Objective, Schedule, Stage

__all__ = [  # noqa: RUF022 (in groups)
    # The model.
    "GatePlacement",
    "Initializer",
    "InitialState",
    "Injection",
    "ModelConfig",
    "NormPlacement",
    "PositionSignal",
    "Residual",
    "StateNorm",
    "TimeSignal",
    # Its computation.
    "AttentionKernel",
    "ComputeConfig",
    "Dtype",
    "Gather",
    "MeshConfig",
    "Reduce",
    "Remat",
    "TopologySettings",
    # The data.
    "DataConfig",
    "OnBadRecord",
    "ReadLimits",
    "RecordKind",
    "SourceConfig",
    "sources_like",
    # Stages and their objectives.
    "Advantage",
    "Aggregation",
    "Credit",
    "DepthConfig",
    "DepthKind",
    "DepthPer",
    "GateTarget",
    "Gradient",
    "JacobianNorm",
    "JacobianPenalty",
    "LoopRPTConfig",
    "LoopWeights",
    "Objective",
    "PolicyConfig",
    "PriorConfig",
    "PriorKind",
    "ReadOut",
    "Reward",
    "Schedule",
    "Shortcut",
    "Solver",
    "SolverKind",
    "Stage",
    # The optimizer and the run.
    "CheckpointConfig",
    "EvaluationConfig",
    "GuardConfig",
    "OptimizerConfig",
    "OptimizerKind",
    "Recipe",
    "StartConfig",
    # The help texts of all of them.
    "help_text",
]

_MOST_STEPS = 2**31 - 1  # the step counter of a checkpoint has 32 bits


# Optimizer


class OptimizerKind(enum.Enum):
    """The optimizer.

    ADAMW: AdamW. ADAFACTOR: Adafactor, whose learning rate is relative to the size of each parameter, and which keeps
    only means over rows and columns of squared gradients. MUON: Muon for the matrices of the shared stack, at the scale
    of AdamW's updates, and AdamW for all other parameters.
    """

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"
    MUON = "muon"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer. Norms and biases have no weight decay."""

    kind: OptimizerKind = _field("what turns gradients into updates", OptimizerKind.ADAMW)
    # AdamW, also beside Muon.
    b1: float = _field("adamw and muon: decay of AdamW's mean of gradients", 0.9)
    b2: float = _field("adamw and muon: decay of AdamW's mean of squared gradients", 0.95)
    eps: float = _field("adamw and muon: added to the root of AdamW's second moment", 1e-8)
    # The others.
    momentum: float = _field("muon: decay of its mean of gradients", 0.95)
    decay_exponent: float = _field("adafactor: its mean of squared gradients decays by 1 - t^-decay_exponent", 0.8)
    # All.
    weight_decay: float = _field("decay of matrices, multiplied by the learning rate", 0.1)
    clip_norm: float = _field("largest global norm of the gradient", 1.0)

    def __post_init__(self) -> None:
        _check_kinds(self, "optimizer")
        for name in ("b1", "b2", "momentum"):
            _require(0 <= getattr(self, name) < 1, f"optimizer.{name} must be in [0, 1), not {getattr(self, name)}")
        _require(0 < self.decay_exponent <= 1, f"optimizer.decay_exponent must be in (0, 1], not {self.decay_exponent}")
        for name in ("eps", "clip_norm"):
            _require(getattr(self, name) > 0, f"optimizer.{name} must be positive, not {getattr(self, name)}")
        _require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, not {self.weight_decay}")
        _refuse_without_effect(self, "optimizer", _OPTIMIZER_WITHOUT_EFFECT[self.kind])


_OPTIMIZER_WITHOUT_EFFECT = {
    OptimizerKind.ADAMW: ("momentum", "decay_exponent"),
    OptimizerKind.ADAFACTOR: ("b1", "b2", "eps", "momentum"),
    OptimizerKind.MUON: ("decay_exponent",),
}


# Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Criteria for skipping a step, and for stopping the run after consecutive skips."""

    window: int = _field("number of latest losses that a loss is compared with", 128)
    sigma: float = _field("a loss this many standard deviations above the usual losses of the window is a spike", 6.0)
    patience: int = _field("consecutive skipped steps that stop the run", 10)

    def __post_init__(self) -> None:
        _check_kinds(self, "guard")
        _require(self.window >= 2, f"guard.window must be at least 2, not {self.window}")
        _require(self.sigma > 0, f"guard.sigma must be positive, not {self.sigma}")
        _require(self.patience >= 1, f"guard.patience must be at least 1, not {self.patience}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """The interval between saves, and the number of checkpoints to keep."""

    every: int = _field("steps between saves; the last step of a stage is always saved", 200)
    keep: int = _field("number of latest checkpoints to keep; the last one of each stage is always kept", 3)

    def __post_init__(self) -> None:
        _check_kinds(self, "checkpoint")
        for name in ("every", "keep"):
            _require(getattr(self, name) >= 1, f"checkpoint.{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The interval between evaluations during training, and the number of held-out sequences for each."""

    every: int = _field("steps between evaluations; 0: only at the end of a stage", 0)
    sequences: int = _field("held-out sequences used", 64)

    def __post_init__(self) -> None:
        _check_kinds(self, "evaluation")
        _require(self.every >= 0, f"evaluation.every must not be negative, not {self.every}")
        _require(self.sequences >= 1, f"evaluation.sequences must be at least 1, not {self.sequences}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartConfig:
    """The checkpoint from which a new run starts. A run that resumes does not read it again."""

    checkpoint: str = _field("a run folder, one of its steps, or a Hugging Face folder; empty: initial parameters", "")
    optimizer: bool = _field("also use the optimizer state of that checkpoint", False)
    model: bool = _field("also use its model, and its number of loops in every stage, instead of the recipe's", False)
    chat_tokens: bool = _field("add the tokens of the chat format to a tokenizer that lacks them", False)

    def __post_init__(self) -> None:
        _check_kinds(self, "start")
        _require(bool(self.checkpoint) or not self.optimizer, "start.optimizer needs start.checkpoint; set both")
        _require(
            not (self.optimizer and self.chat_tokens),
            "start.chat_tokens may add rows to the embedding, of which start.optimizer has no state; set one of them",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run: the model, the data, and the stages of training."""

    name: str = _field("name of the recipe")
    description: str = _field("purpose, duration and results", "")
    seed: int = _field("seed of the initial parameters", 0)
    # What is trained, and in which stages.
    model: ModelConfig
    stages: tuple[Stage, ...]
    # How it is computed.
    compute: ComputeConfig = dataclasses.field(default_factory=ComputeConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    # How it is trained.
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    start: StartConfig = dataclasses.field(default_factory=StartConfig)
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    # What is written.
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    log_every: int = _field("steps between lines of metrics.jsonl", 10)
    topology: str = _field("topology whose settings the stages use, set when a run starts; none: use none", "")

    def __post_init__(self) -> None:
        _check_kinds(self, "")
        _require(len(self.stages) >= 1, f"recipe {self.name!r} needs at least one stage")

        # Names are addresses of fields, and checkpoints refer to them.
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"the stages of recipe {self.name!r} need different names, not {names}")
        _require(self.log_every >= 1, f"log_every must be at least 1, not {self.log_every}")
        _require(
            self.total_steps <= _MOST_STEPS,
            f"the stages of recipe {self.name!r} have {self.total_steps} steps together, more than {_MOST_STEPS}",
        )

        # A longer sequence would have positions that the model does not accept.
        for stage in self.stages:
            _require(
                stage.sequence_length <= self.model.max_positions,
                f"stages.{stage.name}.sequence_length={stage.sequence_length} is beyond "
                f"model.max_positions={self.model.max_positions}",
            )
            self._check_model(stage)

    def _check_model(self, stage: Stage) -> None:
        """Raises UserError for a stage that the model cannot run."""
        where = f"stages.{stage.name}"
        gated = stage.objective is not Objective.LAST_LOSS
        _require(
            self.model.gate is not GatePlacement.NONE or not gated,
            f"{where}.objective={stage.objective.value} needs an exit gate; "
            f"set {where}.objective=last_loss, or model.gate=after",
        )
        _require(
            self.model.initial_state is not InitialState.NOISE or stage.objective is not Objective.LOOPRPT,
            f"{where}.objective=looprpt has noise of its own (looprpt.noise) and does not start from "
            "model.initial_state=noise; set model.initial_state=zero",
        )
        if stage.gradient is Gradient.IMPLICIT:
            _require(
                self.model.injection is not Injection.NONE,
                f"{where}.gradient=implicit needs the input in every loop, or its fixed point would not depend on the "
                "tokens; set model.injection",
            )
            _require(
                self.model.time_signal is TimeSignal.NONE,
                f"{where}.gradient=implicit needs equal loops; set model.time_signal=none",
            )
        _require(
            self.model.initial_state is not InitialState.NOISE or stage.objective is not Objective.POLICY_GRADIENT,
            f"{where}.objective=policy_gradient replays its answers, and no replay reproduces random first states; "
            "set model.initial_state=zero",
        )
        _require(
            self.model.time_signal is not TimeSignal.LEARNED or stage.deepest <= self.model.time_rows,
            f"{where}.loops={stage.deepest} is beyond the {self.model.time_rows} rows of model.time_signal=learned; "
            f"set model.max_loops={stage.deepest}",
        )

    def model_of(self, stage: Stage) -> ModelConfig:
        """Returns the model in a stage, with the rotary base that this stage or an earlier one has set."""
        known = self.stages[: self.stages.index(stage) + 1]
        # The latest base that is set applies.
        bases = [self.model.rope_theta, *(earlier.rope_theta for earlier in known if earlier.rope_theta)]
        return dataclasses.replace(self.model, rope_theta=bases[-1])

    def data_of(self, stage: Stage) -> DataConfig:
        """Returns the data of a stage: its own mixture, or else that of the recipe."""
        root = self.data.root.replace("{length}", str(stage.sequence_length))
        return dataclasses.replace(self.data, root=root, sources=stage.sources or self.data.sources)

    def settings_of(self, stage: Stage) -> TopologySettings | None:
        """Returns the settings of a stage for the recipe's topology, or None."""
        return next((each for each in stage.settings if each.topology == self.topology), None)

    def compute_of(self, stage: Stage) -> ComputeConfig:
        """Returns how a stage is computed: by its settings for the topology, or else as the recipe says."""
        settings = self.settings_of(stage)
        return self.compute if settings is None else settings.compute

    def mesh_of(self, stage: Stage) -> MeshConfig:
        """Returns the mesh of a stage.

        It is that of the stage's settings for the topology, or else that of the recipe with the stage's number of
        devices per sequence.
        """
        settings = self.settings_of(stage)
        if settings is not None:
            return settings.mesh
        return self.mesh.with_context(stage.context) if stage.context else self.mesh

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps of all stages together."""
        return sum(stage.steps for stage in self.stages)
