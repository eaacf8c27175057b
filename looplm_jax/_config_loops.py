"""The loops of a stage: their number, the gradient through them, and penalties on them."""

import dataclasses
import enum

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import refuse_without_effect as _refuse_without_effect
from looplm_jax._config_fields import require as _require

# Their number


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


# Gradients and fixed points


class Gradient(enum.Enum):
    """The gradient of a stage that reads out the last loop only.

    UNROLLED: that of its loops, or of the last `backprop_loops`. IMPLICIT: that of the fixed point of the loop, which a
    solver finds (deep equilibrium models, arXiv 1909.01377); its memory is that of one loop.
    """

    UNROLLED = "unrolled"
    IMPLICIT = "implicit"


class SolverKind(enum.Enum):
    """The iteration toward a fixed point: plain loops, Anderson acceleration, or Broyden's method."""

    LOOPS = "loops"
    ANDERSON = "anderson"
    BROYDEN = "broyden"


class JacobianNorm(enum.Enum):
    """The norm of the Jacobian of a loop that a penalty bounds: Frobenius, per entry, or spectral, over all rows."""

    FROBENIUS = "frobenius"
    SPECTRAL = "spectral"


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
class JacobianPenalty:
    """A penalty on the Jacobian of the loop at its last state, which keeps loops stable (arXiv 2106.14342).

    Sequences do not depend on each other, so each has a Jacobian of its own; the penalty is their mean.
    """

    weight: float = _field("weight of the penalty in the loss; 0: none", 0.0)
    kind: JacobianNorm = _field("norm whose square is the penalty", JacobianNorm.FROBENIUS)
    iterations: int = _field("spectral: products with the Jacobian", 1)
    share_of_steps: float = _field("fraction of steps with the penalty, drawn at random", 1.0)
    after: int = _field("steps of the stage before the first penalty", 0)

    def __post_init__(self) -> None:
        _check_kinds(self, "jacobian")
        for name in ("weight", "after"):
            _require(getattr(self, name) >= 0, f"jacobian.{name} must not be negative, not {getattr(self, name)}")
        _require(self.iterations >= 1, f"jacobian.iterations must be at least 1, not {self.iterations}")
        _require(0 < self.share_of_steps <= 1, f"jacobian.share_of_steps must be in (0, 1], not {self.share_of_steps}")
        without_effect = ("iterations",) if self.kind is JacobianNorm.FROBENIUS else ()
        _refuse_without_effect(self, "jacobian", without_effect)


# Shorter passes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortcut:
    """Losses of a second pass with fewer and longer loops, which teach a model to skip loops (arXiv 2602.11451).

    The number of its loops is drawn uniformly from 1..loops-1 at every step. The published weights are 0.1 and 0.1.
    """

    weight_loss: float = _field("weight of the loss of a pass with fewer loops; 0: none", 0.0)
    weight_state: float = _field("weight of the distance of its last state from that of all loops; 0: none", 0.0)

    def __post_init__(self) -> None:
        _check_kinds(self, "shortcut")
        for name in ("weight_loss", "weight_state"):
            _require(getattr(self, name) >= 0, f"shortcut.{name} must not be negative, not {getattr(self, name)}")

    @property
    def any(self) -> bool:
        """Whether there is a second pass."""
        return self.weight_loss > 0 or self.weight_state > 0
