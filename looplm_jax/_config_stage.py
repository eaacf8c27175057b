"""One stage of training: its objective, its batches, its loops and its learning rate."""

import dataclasses
import enum

from looplm_jax._config_compute import TopologySettings
from looplm_jax._config_data import SourceConfig
from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import require as _require
from looplm_jax._config_loops import (
    DepthConfig,
    DepthKind,
    DepthPer,
    Gradient,
    JacobianPenalty,
    ReadOut,
    Shortcut,
    Solver,
)
from looplm_jax._config_objectives import Credit, GateTarget, LoopRPTConfig, PolicyConfig, PriorConfig

# Choices


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


class Schedule(enum.Enum):
    """The learning rate after warm-up: constant, cosine to the final rate, or constant followed by linear decay to it.

    The last step of a cosine or a decay has the final rate.
    """

    CONSTANT = "constant"
    COSINE = "cosine"
    WARMUP_STABLE_DECAY = "warmup_stable_decay"


# Stages


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
    damping: float = _field("weight of the new state in each of the last backprop_loops loops", 1.0)
    gradient: Gradient = _field("gradient of the loops, with read_out=last", Gradient.UNROLLED)
    solver: Solver = dataclasses.field(default_factory=Solver)
    jacobian: JacobianPenalty = dataclasses.field(default_factory=JacobianPenalty)
    shortcut: Shortcut = dataclasses.field(default_factory=Shortcut)
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
        self._check_equilibrium(where)
        self._check_shortcut(where)
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
        _require(0 < self.damping <= 1, f"{where}.damping must be in (0, 1], not {self.damping}")
        _require(
            self.damping == 1 or self.backprop_loops > 0,
            f"{where}.damping={self.damping} is that of the last loops with gradients; "
            f"set {where}.backprop_loops, or {where}.damping=1",
        )

    def _check_equilibrium(self, where: str) -> None:
        """Raises UserError for an implicit gradient or a Jacobian penalty of a stage that has none."""
        last, implicit = self.read_out is ReadOut.LAST, self.gradient is Gradient.IMPLICIT
        _require(
            last or not implicit,
            f"{where}.gradient=implicit is that of one fixed point, not of every loop; set {where}.read_out=last",
        )
        _require(
            not implicit or (self.drawn.kind is DepthKind.FIXED and self.backprop_loops == 0),
            f"{where}.gradient=implicit runs the loops of {where}.solver; set {where}.backprop_loops=0, "
            f"{where}.min_loops=0 and {where}.depth.kind=fixed",
        )
        _require(
            last or self.jacobian.weight == 0,
            f"{where}.jacobian.weight={self.jacobian.weight} is of the Jacobian at the last loop; "
            f"set {where}.read_out=last, or {where}.jacobian.weight=0",
        )

    def _check_shortcut(self, where: str) -> None:
        """Raises UserError for a shorter pass beside loops that it cannot shorten."""
        if not self.shortcut.any:
            return
        _require(
            self.read_out is ReadOut.LAST and self.gradient is Gradient.UNROLLED,
            f"{where}.shortcut compares the last states of two passes; "
            f"set {where}.objective=last_loss, {where}.read_out=last and {where}.gradient=unrolled",
        )
        _require(
            self.drawn.kind is DepthKind.FIXED and self.backprop_loops == 0,
            f"{where}.shortcut shortens a fixed number of loops, all with gradients; "
            f"set {where}.depth.kind=fixed, {where}.min_loops=0 and {where}.backprop_loops=0",
        )
        _require(self.loops >= 2, f"{where}.shortcut needs at least 2 loops to skip one; set {where}.loops")

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
            case DepthKind.FIXED if self.gradient is Gradient.IMPLICIT:
                return f"up to {self.solver.max_loops} (fixed point, {self.solver.kind.value})"
            case DepthKind.FIXED:
                return str(self.loops)
            case DepthKind.UNIFORM:
                return span
            case DepthKind.GROWING:
                return f"{span} (one more every {drawn.every} steps)"
        return f"{span} ({drawn.kind.value}, mean {drawn.mean:g})"

    @property
    def mean_loops(self) -> float:
        """The mean number of loops of a step, or the largest of a growing one or of a solver.

        The limits of a drawn depth shift its mean a little.
        """
        drawn = self.drawn
        match drawn.kind:
            case DepthKind.FIXED if self.gradient is Gradient.IMPLICIT:
                return self.solver.max_loops
            case DepthKind.FIXED | DepthKind.GROWING:
                return self.deepest
            case DepthKind.UNIFORM:
                return (drawn.min + drawn.max) / 2
        return min(max(drawn.mean, drawn.min), drawn.max)

    @property
    def mean_short_loops(self) -> float:
        """The mean number of loops of the second pass of a shortcut; 0 without one."""
        return self.loops / 2 if self.shortcut.any else 0.0

    @property
    def backward_loops(self) -> int:
        """The number of last loops with a backward pass; 0 for all."""
        return 1 if self.gradient is Gradient.IMPLICIT else self.backprop_loops

    @property
    def trained_groups(self) -> tuple[str, ...]:
        """The parameter groups to train: the named ones, or else all, or the gate if it is the objective."""
        return self.trainable or (("gate",) if self.objective is Objective.GATE else ())
