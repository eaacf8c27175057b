"""Configuration: frozen, keyword-only dataclasses, the single source for Python, the CLI, `--help` and checkpoints.

Every class validates itself on creation. `codec` converts configurations to JSON and back and applies overrides. The
help text of each field is printed by `looplm train --help`.
"""

import dataclasses
import enum
import re
from collections.abc import Iterable
from typing import Any

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import help_text as help_text
from looplm_jax._config_fields import require as _require
from looplm_jax._config_model import GatePlacement as GatePlacement
from looplm_jax._config_model import Initializer as Initializer
from looplm_jax._config_model import InitialState as InitialState
from looplm_jax._config_model import Injection as Injection
from looplm_jax._config_model import ModelConfig as ModelConfig
from looplm_jax._config_model import NormPlacement as NormPlacement
from looplm_jax._config_model import PositionSignal as PositionSignal
from looplm_jax._config_model import Residual as Residual
from looplm_jax._config_model import StateNorm as StateNorm
from looplm_jax._config_model import TimeSignal as TimeSignal
from looplm_jax.errors import UserError

_MOST_STEPS = 2**31 - 1  # the step counter of a checkpoint has 32 bits
# For example v5e:16x16, 2 x v5p:4x8x8, cpu:8.
_TOPOLOGY = re.compile(r"(?:[1-9]\d* x )?[a-z][a-z0-9-]*:[1-9]\d*(?:x[1-9]\d*)*")


# Validation


def _refuse_without_effect(config: Any, where: str, names: tuple[str, ...]) -> None:
    """Raises UserError if one of the fields, which the kind of `config` does not read, differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value, default = getattr(config, name), defaults[name]
        _require(
            value == default,
            f"{where}.{name}={_shown(value)} has no effect with {where}.kind={config.kind.value}; "
            f"leave it at {_shown(default)}, or choose another kind",
        )


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


# Choices


class Dtype(enum.Enum):
    """The dtype of matrix products. `auto` is bfloat16 on TPU and GPU, and float32 on CPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class AttentionKernel(enum.Enum):
    """The implementation of self-attention: XLA, the splash kernel on TPU, or the cuDNN or Triton kernel on GPU.

    `auto` selects splash on TPU if the shapes allow it. On GPU, if shapes and dtype allow it, it selects cuDNN below
    8,192 tokens and Triton from there on. Otherwise it selects XLA.
    """

    AUTO = "auto"
    XLA = "xla"
    SPLASH = "splash"
    CUDNN = "cudnn"
    TRITON = "triton"


class Remat(enum.Enum):
    """The values that the backward pass recomputes: none, all except matrix products, each layer, or each whole loop.

    `save_qkv` recomputes each layer except queries, keys, values and the outputs of attention and feed-forward.
    `save_outputs` saves only the two outputs. `offload` recomputes each layer from its input, which is kept in host
    memory.
    """

    NONE = "none"
    DOTS = "dots"
    SAVE_QKV = "save_qkv"
    SAVE_OUTPUTS = "save_outputs"
    LAYER = "layer"
    LOOP = "loop"
    OFFLOAD = "offload"


class Gather(enum.Enum):
    """The frequency of all-gathering sharded parameters: for each layer of each loop, or once per step.

    All loops use the same weights. `per_step` divides the communication by the number of loops, and holds a whole copy
    during the step.
    """

    PER_LAYER = "per_layer"
    PER_STEP = "per_step"


class Reduce(enum.Enum):
    """The frequency of summing gradients over devices: in every loop of the model, per microbatch, or per step.

    `microbatch` and `step` hold the gradient of all parameters on every device, and need `gather=per_step`. The
    gradient is in the dtype of the matrix products for `microbatch` and in float32 for `step`. `auto` is `step` if each
    device holds all parameters anyway, and `loop` if they are sharded.
    """

    AUTO = "auto"
    LOOP = "loop"
    MICROBATCH = "microbatch"
    STEP = "step"


class Objective(enum.Enum):
    """The objective that a stage minimizes.

    EXPECTED_LOSS: the expected loss over exits (Eq. 4). GATE: the adaptive loss of the gate (Eq. 5-6). LAST_LOSS: the
    loss after the last loop only, as looped models without a gate are trained; the gate receives no gradient. PONDER:
    the loss of the states of all loops, mixed by Adaptive Computation Time, and the cost of the loops (Universal
    Transformer, arXiv 1807.03819). LOOPRPT: reinforcement learning on text (arXiv 2603.19714), which rewards exits by
    how well they predict the next token. POLICY_GRADIENT: reinforcement learning on answers that
    the model generates to problems.
    """

    EXPECTED_LOSS = "expected_loss"
    GATE = "gate"
    LAST_LOSS = "last_loss"
    PONDER = "ponder"
    LOOPRPT = "looprpt"
    POLICY_GRADIENT = "policy_gradient"


class DepthKind(enum.Enum):
    """The number of loops of a step.

    FIXED: the loops of the stage. UNIFORM: drawn uniformly from min..max. POISSON: 1 plus a Poisson variable.
    POISSON_LOG_NORMAL: the same with a log-normal rate (Huginn). LOG_NORMAL: a log-normal variable, rounded. GROWING:
    from min at the first step to max, one more every `every` steps.
    """

    FIXED = "fixed"
    UNIFORM = "uniform"
    POISSON = "poisson"
    POISSON_LOG_NORMAL = "poisson_log_normal"
    LOG_NORMAL = "log_normal"
    GROWING = "growing"


class DepthPer(enum.Enum):
    """The sequences that share a drawn number of loops: all sequences of a step, or only each with itself."""

    STEP = "step"
    SEQUENCE = "sequence"


class ReadOut(enum.Enum):
    """The loops after which coda, gate and head run in training: every loop, or only the last one.

    With `last`, one compiled program serves all numbers of loops.
    """

    EVERY_LOOP = "every_loop"
    LAST = "last"


class SolverKind(enum.Enum):
    """The iteration toward a fixed point: plain loops, Anderson acceleration, or Broyden's method."""

    LOOPS = "loops"
    ANDERSON = "anderson"
    BROYDEN = "broyden"


class JacobianNorm(enum.Enum):
    """The norm of the Jacobian of a loop that a penalty bounds: Frobenius, per entry, or spectral, over all rows."""

    FROBENIUS = "frobenius"
    SPECTRAL = "spectral"


class GateTarget(enum.Enum):
    """The gain that trains the gate of loop t: the previous one, t-1 -> t (as printed), or the next, t -> t+1."""

    AS_PRINTED = "as_printed"
    LOOK_AHEAD = "look_ahead"


class Advantage(enum.Enum):
    """The comparison of the rewards of answers to one prompt.

    STD: distance from the mean in standard deviations (GRPO). MEAN: distance from the mean (Dr. GRPO). LEAVE_ONE_OUT:
    distance from the mean of the other answers.
    """

    STD = "std"
    MEAN = "mean"
    LEAVE_ONE_OUT = "leave_one_out"


class Aggregation(enum.Enum):
    """The mean that turns terms of tokens into the loss of a policy gradient.

    SEQUENCE: over the tokens of each answer, then over answers (GRPO). TOKEN: over all tokens (DAPO). CONSTANT: the
    sum, divided by the number of answers times the largest length (Dr. GRPO).
    """

    SEQUENCE = "sequence"
    TOKEN = "token"
    CONSTANT = "constant"


class Credit(enum.Enum):
    """The action of a token whose probability a policy gradient changes.

    ACTION: the token and its exit loop. TOKEN: the token at its exit loop; the gate learns nothing. TRAJECTORY: the
    token at all loops, by their weights (RLTT, arXiv 2602.10520).
    """

    ACTION = "action"
    TOKEN = "token"
    TRAJECTORY = "trajectory"


class Reward(enum.Enum):
    """The judge of an answer, which compares it with the right one.

    EXACT: the same text, but for white space around it. NUMBER: the same last number. BOXED: the same content in the
    last `\\boxed{...}`.
    """

    EXACT = "exact"
    NUMBER = "number"
    BOXED = "boxed"


class LoopWeights(enum.Enum):
    """The weights of the loops of a token in RLTT.

    UNIFORM: 1/T. PROGRESSIVE: in proportion to a power of the loop. EXIT_PDF: the exit distribution, which is trained
    through them. EXIT_PDF_CONSTANT: the exit distribution as a constant.
    """

    UNIFORM = "uniform"
    PROGRESSIVE = "progressive"
    EXIT_PDF = "exit_pdf"
    EXIT_PDF_CONSTANT = "exit_pdf_constant"


class PriorKind(enum.Enum):
    """The family of the prior over exit loops."""

    UNIFORM = "uniform"
    GEOMETRIC = "geometric"
    POISSON_LOG_NORMAL = "poisson_log_normal"


class Schedule(enum.Enum):
    """The learning rate after warm-up: constant, cosine to the final rate, or constant followed by linear decay to it.

    The last step of a cosine or a decay has the final rate.
    """

    CONSTANT = "constant"
    COSINE = "cosine"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


class OptimizerKind(enum.Enum):
    """The optimizer.

    ADAMW: AdamW. ADAFACTOR: Adafactor, whose learning rate is relative to the size of each parameter, and which keeps
    only means over rows and columns of squared gradients. MUON: Muon for the matrices of the shared stack, at the scale
    of AdamW's updates, and AdamW for all other parameters.
    """

    ADAMW = "adamw"
    ADAFACTOR = "adafactor"
    MUON = "muon"


class RecordKind(enum.Enum):
    """The kind of the records of a source.

    TEXT: texts. CHAT: chats, of which only the assistant's turns are learned. PROBLEM: prompts with an answer, which is
    learned, or which judges the answers of the model.
    """

    TEXT = "text"
    CHAT = "chat"
    PROBLEM = "problem"


class OnBadRecord(enum.Enum):
    """The action for a record that cannot be read: stop the run, or skip the record and count it."""

    STOP = "stop"
    SKIP = "skip"


# Computation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """The solver of a fixed point `z = f(z)`, and when it stops."""

    kind: SolverKind = _field("iteration toward the fixed point", SolverKind.LOOPS)
    tolerance: float = _field("a row stops once |f(z) - z| / |f(z)| is at most this; 0: at max_loops", 1e-3)
    max_loops: int = _field("most evaluations of f", 50)
    memory: int = _field("states that anderson combines; updates after which broyden restarts", 6)

    def __post_init__(self) -> None:
        _check_kinds(self, "solver")
        _require(self.tolerance >= 0, f"solver.tolerance must not be negative, not {self.tolerance}")
        for name in ("max_loops", "memory"):
            _require(getattr(self, name) >= 1, f"solver.{name} must be at least 1, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """The computation of the model: dtype, attention kernel, rematerialization and collectives.

    No field changes the contents of a checkpoint.
    """

    # Arithmetic.
    dtype: Dtype = _field("dtype of matrix products; parameters stay float32", Dtype.AUTO)
    attention: AttentionKernel = _field("implementation of self-attention", AttentionKernel.AUTO)
    # Memory and communication.
    remat: Remat = _field("what the backward pass recomputes", Remat.LAYER)
    gather: Gather = _field("when sharded parameters are all-gathered", Gather.PER_LAYER)
    reduce: Reduce = _field("when gradients are summed over devices", Reduce.AUTO)
    loss_chunk: int = _field("positions whose logits are computed at a time", 128)

    def __post_init__(self) -> None:
        _check_kinds(self, "compute")
        _require(
            self.reduce in (Reduce.AUTO, Reduce.LOOP) or self.gather is Gather.PER_STEP,
            f"compute.reduce={self.reduce.value} needs whole parameters on every device; "
            "set compute.gather=per_step, or compute.reduce=loop",
        )
        _require(self.loss_chunk >= 1, f"compute.loss_chunk must be at least 1, not {self.loss_chunk}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each axis of the mesh.

    The product must be the number of devices. One axis may be -1, which takes the remaining devices.
    """

    data: int = _field("copies of the model, each with a shard of the batch", -1)
    fsdp: int = _field("shards of the parameters, each with a shard of the batch", 1)
    tensor: int = _field("shards of heads, feed-forward width and vocabulary", 1)
    context: int = _field("shards of each sequence, which also shard the parameters", 1)

    def __post_init__(self) -> None:
        _check_kinds(self, "mesh")
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            _require(
                size == -1 or size >= 1, f"mesh.{name} must be at least 1, or -1 for all that are left, not {size}"
            )
        # Two open axes would have more than one solution.
        _require(list(sizes.values()).count(-1) <= 1, "only one axis of mesh may be -1")

    def with_context(self, context: int) -> "MeshConfig":
        """Returns a mesh of the same devices in which `context` devices share a sequence.

        The devices are taken from `fsdp`, or else from `data`. Parameters are sharded over `fsdp` and `context` alike,
        so devices from `fsdp` move no parameter. An axis of -1 adapts by itself.

        Raises:
          UserError: neither axis has enough devices.
        """
        # An axis of -1 takes the devices that remain.
        if -1 in dataclasses.asdict(self).values():
            return dataclasses.replace(self, context=context)

        # Devices that share a sequence now are free for the new number.
        for name in ("fsdp", "data"):
            size = getattr(self, name) * self.context
            if size % context == 0:
                return dataclasses.replace(self, **{name: size // context}, context=context)

        raise UserError(
            f"{context} devices cannot share a sequence: neither mesh.fsdp={self.fsdp} nor mesh.data={self.data} "
            "divides; change one of them, or the context of the stage"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopologySettings:
    """The settings of a stage for one topology, which replace the recipe's `mesh` and `compute`.

    Nothing here changes what is trained: the results are the same to rounding.
    """

    topology: str = _field("devices as `looplm plan` names them, such as v5e:16x16, 2 x v5p:4x8x8 or cpu:8")
    accumulation: int = _field("microbatches of a step")
    mesh: MeshConfig
    compute: ComputeConfig

    def __post_init__(self) -> None:
        _check_kinds(self, "settings")
        _require(
            _TOPOLOGY.fullmatch(self.topology) is not None,
            f"settings.topology must look like v5e:16x16, 2 x v5p:4x8x8 or cpu:8, not {self.topology!r}",
        )
        _require(
            self.accumulation >= 1,
            f"settings.{self.topology}.accumulation must be at least 1, not {self.accumulation}",
        )


# Optimizer


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


# Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of the mixture: files of documents, or a synthetic task such as `mano:length=10`."""

    # What is read, and how often it is drawn.
    path: str = _field(
        "files (a glob; local or any fsspec URL; .txt .jsonl .parquet .arrayrecord), "
        "`huggingface:dataset,split=...`, or `task:option=value,...`"
    )
    weight: float = _field("weight of this source among the documents that are drawn", 1.0)
    # How a record becomes text.
    kind: RecordKind = _field("kind of the records", RecordKind.TEXT)
    text_key: str = _field("field or column with the text", "text")
    messages_key: str = _field("field or column with the messages of a chat", "messages")
    prompt_key: str = _field("field with the prompt of a problem, a text or the messages of a chat", "prompt")
    answer_key: str = _field("field with the answer of a problem", "answer")
    template: str = _field("text of a problem, around its {prompt}", "{prompt}")
    special_tokens: bool = _field("encode the names of special tokens, such as <|im_end|>, as these tokens", False)

    def __post_init__(self) -> None:
        _check_kinds(self, "source")
        _require(bool(self.path), "a data source needs a path")
        _require(self.weight > 0, f"the weight of source {self.path!r} must be positive, not {self.weight}")
        _require(
            "{prompt}" in self.template, f"the template of a source must contain {{prompt}}, not {self.template!r}"
        )

    @property
    def key(self) -> str:
        """The field or column that is read; of a problem, that of the prompt."""
        match self.kind:
            case RecordKind.TEXT:
                return self.text_key
            case RecordKind.CHAT:
                return self.messages_key
            case RecordKind.PROBLEM:
                return self.prompt_key


def sources_like(paths: Iterable[str], known: Iterable[SourceConfig]) -> tuple[SourceConfig, ...]:
    """Returns sources of equal weight with the kind and keys of the known ones, or text sources if those differ."""
    # Everything except path and weight, so that files given by a flag are read as those that they replace.
    patterns = {dataclasses.replace(source, path="-", weight=1.0) for source in known}
    pattern = patterns.pop() if len(patterns) == 1 else SourceConfig(path="-")
    return tuple(dataclasses.replace(pattern, path=path) for path in paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadLimits:
    """Limits on what data files may use, so that no file exhausts the memory or the disk."""

    record_bytes: int = _field(
        "longest line, ArrayRecord record or whole text file; a longer one is a bad record", 2**26
    )
    compression_ratio: int = _field("largest ratio of decompressed to compressed bytes; 1 GiB is always allowed", 256)
    window_bytes: int = _field("largest Zstandard window; the default is that of `zstd --long=31`", 2**31)
    row_group_bytes: int = _field("largest Parquet row group, in decompressed bytes of the column that is read", 2**32)

    def __post_init__(self) -> None:
        _check_kinds(self, "data.limits")
        for name, value in dataclasses.asdict(self).items():
            _require(value >= 1, f"data.limits.{name} must be at least 1, not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data: a mixture of sources, and how they are read and tokenized."""

    # What is read.
    sources: tuple[SourceConfig, ...] = _field("the mixture", ())
    root: str = _field(
        "folder or URL of sources with relative paths; `{length}` in it is the stage's sequence_length", ""
    )
    # How it is tokenized, held out and shuffled.
    tokenizer: str = _field(
        "a SentencePiece .model, a tokenizer.json or a Hugging Face folder; empty: train one on the data", ""
    )
    validation_fraction: float = _field("fraction of documents held out, chosen by a hash of their text", 0.02)
    seed: int = _field("seed of the order of documents", 0)
    # What happens when reading fails.
    on_bad_record: OnBadRecord = _field("action for a record that cannot be read", OnBadRecord.STOP)
    limits: ReadLimits = dataclasses.field(default_factory=ReadLimits)

    def __post_init__(self) -> None:
        _check_kinds(self, "data")
        fraction = self.validation_fraction
        _require(0 <= fraction < 1, f"data.validation_fraction must be in [0, 1), not {fraction}")


# Stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The prior over exit loops toward which the exit distribution is regularized."""

    kind: PriorKind = _field("family of the prior", PriorKind.UNIFORM)
    rate: float = _field("geometric: probability of exit at each loop", 0.5)
    mean: float = _field("poisson_log_normal: mean number of loops", 4.0)
    sigma: float = _field("poisson_log_normal: standard deviation of the log of the rate", 0.5)

    def __post_init__(self) -> None:
        _check_kinds(self, "prior")
        _require(0 < self.rate < 1, f"prior.rate must be in (0, 1), not {self.rate}")
        _require(self.mean > 1, f"prior.mean must exceed 1 loop, not {self.mean}")
        _require(self.sigma > 0, f"prior.sigma must be positive, not {self.sigma}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRPTConfig:
    """Reinforcement learning on the exits of given text: LoopRPT, arXiv 2603.19714.

    The weights are those of the four terms of the loss in `losses.looprpt`.
    """

    # Rollouts.
    rollouts: int = _field("noisy rollouts of a sequence, G; each multiplies the time of a step, not its memory", 8)
    noise: float = _field("standard deviation of the noise on the state after every loop", 0.1)
    # What is learned from.
    hard_share: float = _field("fraction of the tokens of a document, those of the highest entropy, to learn from", 0.2)
    # Rewards.
    exit_threshold: float = _field(
        "cumulative exit probability of the teacher's loop that loops are compared with", 0.5
    )
    penalty: float = _field("price of one more loop, nats", 0.02)
    penalty_scale: float = _field("how much higher the price is for a token that the teacher is certain of", 0.5)
    # Terms of the loss.
    policy_weight: float = _field("weight of the policy gradient of exits", 1.0)
    representation_weight: float = _field("weight of the cross-entropy of every loop, higher for better loops", 1.0)
    entropy_weight: float = _field("weight of the entropy of the exit distribution", 0.01)
    kl_weight: float = _field("weight of the divergence of the rollouts from the teacher", 1e-3)

    teacher_decay: float = _field("decay of the teacher, an average of earlier students; 1: frozen", 0.995)

    def __post_init__(self) -> None:
        _check_kinds(self, "looprpt")
        _require(
            self.rollouts >= 2,
            f"looprpt.rollouts must be at least 2, because rollouts are compared with each other, not {self.rollouts}",
        )
        _require(0 < self.hard_share <= 1, f"looprpt.hard_share must be in (0, 1], not {self.hard_share}")
        for name in ("exit_threshold", "teacher_decay"):
            _require(0 <= getattr(self, name) <= 1, f"looprpt.{name} must be in [0, 1], not {getattr(self, name)}")

        weights = ("policy_weight", "representation_weight", "entropy_weight", "kl_weight")
        for name in ("noise", "penalty", "penalty_scale", *weights):
            _require(getattr(self, name) >= 0, f"looprpt.{name} must not be negative, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """The distribution or the schedule of the number of loops of a stage."""

    kind: DepthKind = _field("how the number of loops of a step is found", DepthKind.FIXED)
    mean: float = _field("poisson, poisson_log_normal and log_normal: mean, before the limits apply", 4.0)
    sigma: float = _field("poisson_log_normal and log_normal: standard deviation of the logarithm", 0.5)
    every: int = _field("growing: steps until the next loop is added", 1000)
    # Limits.
    min: int = _field("fewest loops", 1)
    max: int = _field("most loops; 0: the loops of the stage", 0)
    per: DepthPer = _field("sequences that share a drawn number: those of a step, or each its own", DepthPer.STEP)

    def __post_init__(self) -> None:
        _check_kinds(self, "depth")
        _require(self.mean > 1, f"depth.mean must exceed 1 loop, not {self.mean}")
        _require(self.sigma > 0, f"depth.sigma must be positive, not {self.sigma}")
        for name in ("every", "min"):
            _require(getattr(self, name) >= 1, f"depth.{name} must be at least 1, not {getattr(self, name)}")
        _require(self.max >= 0, f"depth.max must not be negative, not {self.max}")
        _refuse_without_effect(self, "depth", _DEPTH_WITHOUT_EFFECT[self.kind])


_DEPTH_WITHOUT_EFFECT = {
    DepthKind.FIXED: ("mean", "sigma", "every", "min", "max", "per"),
    DepthKind.UNIFORM: ("mean", "sigma", "every"),
    DepthKind.POISSON: ("sigma", "every"),
    DepthKind.POISSON_LOG_NORMAL: ("every",),
    DepthKind.LOG_NORMAL: ("every",),
    DepthKind.GROWING: ("mean", "sigma", "per"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Reinforcement learning on generated answers: GRPO over tokens or over tokens and exits, and RLTT.

    Tokens are drawn at temperature 1 from the whole distribution, because the drawn distribution is the one that is
    updated.
    """

    # Rollouts.
    credit: Credit = _field("what is rewarded", Credit.ACTION)
    exits: str = _field("exit rule of rollouts; sampled with credit=action, loops=T with credit=trajectory", "sampled")
    answers: int = _field("answers to each prompt, G; a step has batch_size prompts", 8)
    max_new_tokens: int = _field("longest answer, in tokens", 64)
    slots: int = _field("answers that are generated at the same time", 64)
    # Rewards.
    reward: Reward = _field("judge of an answer", Reward.EXACT)
    loop_cost: float = _field("subtracted from the reward of an answer, times the share of its loops that it ran", 0.0)
    advantage: Advantage = _field("how rewards of the answers to a prompt are compared", Advantage.STD)
    # The loss.
    aggregation: Aggregation = _field("mean over tokens and answers", Aggregation.SEQUENCE)
    loop_weights: LoopWeights = _field("weights of loops with credit=trajectory", LoopWeights.EXIT_PDF)
    clip_low: float = _field("how far the ratio of probabilities may fall below 1", 0.2)
    clip_high: float = _field("how far the ratio of probabilities may rise above 1", 0.2)
    kl_weight: float = _field("weight of the divergence from the parameters at the start of the stage", 0.0)
    updates: int = _field("updates of the parameters with the answers of a step", 1)
    gap_tolerance: float = _field(
        "largest difference in nats between log-probabilities of rollout and replay; bfloat16 needs about 0.3", 1e-2
    )

    def __post_init__(self) -> None:
        _check_kinds(self, "policy")
        _require(
            self.answers >= 2,
            f"policy.answers must be at least 2, because answers are compared with each other, not {self.answers}",
        )
        for name in ("max_new_tokens", "slots", "updates"):
            _require(getattr(self, name) >= 1, f"policy.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("loop_cost", "clip_low", "clip_high", "kl_weight"):
            _require(getattr(self, name) >= 0, f"policy.{name} must not be negative, not {getattr(self, name)}")
        _require(self.gap_tolerance > 0, f"policy.gap_tolerance must be positive, not {self.gap_tolerance}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of training: its objective, its steps, its batches and the parameters that it trains."""

    name: str = _field("name of the stage")
    objective: Objective = _field("what is minimized", Objective.EXPECTED_LOSS)

    # Length and batches.
    steps: int = _field("optimizer steps")
    batch_size: int = _field("sequences in a step, over all devices and accumulation")
    sequence_length: int = _field("tokens in a sequence, S")
    # How a batch is divided; the result is the same to rounding.
    accumulation: int = _field("microbatches of a step, to save memory", 1)
    context: int = _field("devices that share a sequence; 0: mesh.context", 0)
    settings: tuple[TopologySettings, ...] = _field("how the stage is computed on certain topologies", ())
    # Loops.
    loops: int = _field("loops, T", 4)
    min_loops: int = _field("if not 0: depth.kind=uniform with this depth.min", 0)
    depth: DepthConfig = dataclasses.field(default_factory=DepthConfig)
    read_out: ReadOut = _field("loops after which coda, gate and head run", ReadOut.EVERY_LOOP)
    backprop_loops: int = _field("last loops with gradients (truncated backpropagation); 0: all", 0)
    # What changes with the stage: longer sequences need a larger base, and may need other data.
    rope_theta: float = _field("base of the rotary embedding from this stage on; 0: as before", 0.0)
    sources: tuple[SourceConfig, ...] = _field("the mixture of this stage; empty: data.sources", ())
    # Stage I (Eq. 4).
    beta: float = _field("weight of the exit distribution's entropy (Eq. 4)", 0.05)
    prior: PriorConfig = dataclasses.field(default_factory=PriorConfig)
    # Stage II (Eq. 5 and 6).
    gate_target: GateTarget = _field("which gain trains the gate", GateTarget.AS_PRINTED)
    gain_slope: float = _field("k in Eq. 6", 50.0)
    gain_threshold: float = _field("gamma in Eq. 6, nats", 0.005)
    # Adaptive Computation Time.
    ponder_weight: float = _field("ponder: weight of the mean of loops and remainder", 0.01)
    act_epsilon: float = _field("ponder: a token halts once its probabilities sum to more than 1 minus this", 0.01)
    # Reinforcement learning.
    looprpt: LoopRPTConfig = dataclasses.field(default_factory=LoopRPTConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)

    trainable: tuple[str, ...] = _field("parameter groups to train; empty: all, or the gate if it is the objective", ())
    # Learning rate.
    learning_rate: float = _field("peak learning rate", 3e-4)
    schedule: Schedule = _field("learning rate after warm-up", Schedule.CONSTANT)
    warmup_steps: int = _field("steps of linear warm-up", 0)
    decay_steps: int = _field("warmup_stable_decay: steps of the final decay, the last of which has the final rate", 0)
    final_learning_rate: float = _field("rate of the last step of a cosine or a decay", 0.0)

    def __post_init__(self) -> None:
        where = f"stages.{self.name}"
        _check_kinds(self, where)
        _require(bool(self.name) and "." not in self.name, f"a stage needs a name without dots, not {self.name!r}")

        # Length, batches and loops.
        for name in ("steps", "batch_size", "sequence_length", "accumulation", "loops"):
            _require(getattr(self, name) >= 1, f"{where}.{name} must be at least 1, not {getattr(self, name)}")
        _require(
            self.batch_size % self.accumulation == 0,
            f"{where}.accumulation={self.accumulation} does not divide {where}.batch_size={self.batch_size}",
        )
        _require(
            0 <= self.min_loops <= self.loops, f"{where}.min_loops must be in 0..{self.loops}, not {self.min_loops}"
        )
        self._check_depth(where)
        topologies = [each.topology for each in self.settings]
        _require(len(set(topologies)) == len(topologies), f"{where}.settings name a topology twice: {topologies}")

        # Numbers of which 0 means that the feature is not used.
        for name in (
            "context", "rope_theta", "beta", "ponder_weight", "warmup_steps", "decay_steps", "final_learning_rate"
        ):  # fmt: skip
            _require(getattr(self, name) >= 0, f"{where}.{name} must not be negative, not {getattr(self, name)}")
        for name in ("learning_rate", "gain_slope"):
            _require(getattr(self, name) > 0, f"{where}.{name} must be positive, not {getattr(self, name)}")
        _require(0 < self.act_epsilon < 1, f"{where}.act_epsilon must be in (0, 1), not {self.act_epsilon}")
        # A constant schedule does not read the final rate; `looplm train` prints a note about it.
        _require(
            self.schedule is Schedule.CONSTANT or self.final_learning_rate <= self.learning_rate,
            f"{where}.final_learning_rate must be at most {where}.learning_rate={self.learning_rate}, "
            f"not {self.final_learning_rate}",
        )
        _require(
            self.warmup_steps + self.decay_steps <= self.steps,
            f"{where}: warmup_steps and decay_steps must fit in steps={self.steps}",
        )
        # The loss after the last loop does not depend on the gate.
        _require(
            self.objective is not Objective.LAST_LOSS or set(self.trainable) != {"gate"},
            f"{where}.trainable=gate learns nothing from objective=last_loss; choose other groups or objective=gate",
        )

        if self.objective is Objective.GATE:
            _require(self.loops >= 2, f"{where}: the gate has nothing to learn with one loop; set {where}.loops")
        if self.objective is Objective.PONDER:
            self._check_ponder(where)
        if self.objective is Objective.LOOPRPT:
            _require(
                (self.loops if self.drawn.kind is DepthKind.FIXED else self.drawn.min) >= 2,
                f"{where}: objective=looprpt compares loops with each other and needs at least 2; "
                f"set {where}.loops or {where}.min_loops or {where}.depth.min",
            )
        if self.objective is Objective.POLICY_GRADIENT:
            self._check_policy(where)

    def _check_policy(self, where: str) -> None:
        """Raises UserError for settings of a policy gradient that do not fit each other."""
        policy = self.policy
        _require(
            policy.credit is not Credit.ACTION or policy.exits == "sampled",
            f"{where}.policy.credit=action rewards exits that are drawn, so policy.exits must be sampled, "
            f"not {policy.exits!r}",
        )
        _require(
            policy.credit is not Credit.TRAJECTORY or policy.exits == f"loops={self.loops}",
            f"{where}.policy.credit=trajectory rewards all loops, so policy.exits must be loops={self.loops}, "
            f"not {policy.exits!r}",
        )
        _require(
            policy.credit is not Credit.ACTION or self.loops >= 2,
            f"{where}: there is one exit with one loop; set {where}.loops or policy.credit=token",
        )
        _require(
            self.drawn.kind is DepthKind.FIXED,
            f"{where}.min_loops and {where}.depth have no meaning for objective=policy_gradient, whose exits are those "
            f"of {where}.policy.exits; remove them",
        )
        _require(
            policy.credit is not Credit.TOKEN or set(self.trainable) != {"gate"},
            f"{where}.trainable=gate learns nothing from policy.credit=token; use credit=action",
        )
        _require(
            policy.max_new_tokens < self.sequence_length,
            f"{where}.policy.max_new_tokens={policy.max_new_tokens} leaves no room for a prompt in "
            f"{where}.sequence_length={self.sequence_length}",
        )

    def _check_ponder(self, where: str) -> None:
        """Raises UserError for fields without a meaning for Adaptive Computation Time."""
        _require(self.loops >= 2, f"{where}: objective=ponder mixes loops and needs at least 2; set {where}.loops")
        _require(
            self.drawn.kind is DepthKind.FIXED,
            f"{where}.objective=ponder finds the number of loops of each token; "
            f"set {where}.depth.kind=fixed and {where}.min_loops=0",
        )
        _require(
            self.read_out is ReadOut.EVERY_LOOP,
            f"{where}.objective=ponder reads the mixed state, not that of the last loop; "
            f"set {where}.read_out=every_loop",
        )

    def _check_depth(self, where: str) -> None:
        """Raises UserError for depths, truncation or a read-out that do not fit each other."""
        depth, last = self.depth, self.read_out is ReadOut.LAST
        _require(
            depth.kind is DepthKind.FIXED or not self.min_loops,
            f"{where}.min_loops={self.min_loops} and {where}.depth both say how loops are drawn; remove min_loops",
        )
        _require(
            depth.kind is DepthKind.FIXED or depth.min <= self.deepest,
            f"{where}.depth.min={depth.min} is above its largest number of loops, {self.deepest}; "
            f"lower it, or raise {where}.loops or {where}.depth.max",
        )

        _require(
            not last or self.objective in (Objective.LAST_LOSS, Objective.PONDER),
            f"{where}.read_out=last has no losses of earlier loops, which objective={self.objective.value} needs; "
            "set objective=last_loss, or read_out=every_loop",
        )
        _require(
            last or depth.per is DepthPer.STEP,
            f"{where}.depth.per=sequence needs {where}.read_out=last: losses of every loop need equal depths",
        )
        _require(
            last or not self.backprop_loops,
            f"{where}.backprop_loops={self.backprop_loops} needs {where}.read_out=last: "
            "losses of earlier loops would have no gradients",
        )
        _require(
            0 <= self.backprop_loops <= self.deepest,
            f"{where}.backprop_loops must be in 0..{self.deepest}, the largest number of loops, "
            f"not {self.backprop_loops}",
        )

    @property
    def drawn(self) -> DepthConfig:
        """The distribution of the number of loops, with its largest number filled in."""
        if self.min_loops:
            return DepthConfig(kind=DepthKind.UNIFORM, min=self.min_loops, max=self.loops)
        if self.depth.kind is DepthKind.FIXED:
            return self.depth
        return dataclasses.replace(self.depth, max=self.depth.max or self.loops)

    @property
    def deepest(self) -> int:
        """The largest number of loops of a step."""
        return self.drawn.max or self.loops

    @property
    def loops_text(self) -> str:
        """The number of loops in words, such as `4`, `1 to 4` or `1 to 64 (poisson, mean 8)`."""
        drawn = self.drawn
        span = f"{drawn.min} to {drawn.max}"
        match drawn.kind:
            case DepthKind.FIXED:
                return str(self.loops)
            case DepthKind.UNIFORM:
                return span
            case DepthKind.GROWING:
                return f"{span} (one more every {drawn.every} steps)"
        return f"{span} ({drawn.kind.value}, mean {drawn.mean:g})"

    @property
    def mean_loops(self) -> float:
        """The mean number of loops of a step, or the largest of a growing one; the limits shift it a little."""
        drawn = self.drawn
        match drawn.kind:
            case DepthKind.FIXED | DepthKind.GROWING:
                return self.deepest
            case DepthKind.UNIFORM:
                return (drawn.min + drawn.max) / 2
        return min(max(drawn.mean, drawn.min), drawn.max)

    @property
    def trained_groups(self) -> tuple[str, ...]:
        """The parameter groups to train: the named ones, or else all, or the gate if it is the objective."""
        return self.trainable or (("gate",) if self.objective is Objective.GATE else ())


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
