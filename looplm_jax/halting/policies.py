"""Exit policies: small frozen objects that decide, per token, the loop to leave at.

Here are those that read the number of the loop and the gate, bounds around any policy, and a function of one's own;
`readouts.py` has those that read states and predictions. A policy of one's own class is a frozen dataclass of `int`
and `float` fields with the members of `ExitPolicy`.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.halting.signals import Needs, Signals

_MOST_LOOPS = 2**31 - 1


@runtime_checkable
class ExitPolicy(Protocol):
    """Decides after each loop which tokens leave. The last loop ends a token whatever a policy says."""

    @property
    def needs(self) -> Needs:
        """What it reads besides the number of the loop; the same for every object of a class, save `Custom`."""

    @property
    def max_loops(self) -> int | None:
        """The most loops this policy asks for; None leaves it to the model."""

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """True for the tokens that leave. What compares with the loop before is False at loop 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedLoops:
    """Every token takes the same number of loops."""

    loops: int
    needs: ClassVar[Needs] = Needs(0)

    def __post_init__(self) -> None:
        check_count("loops", self.loops)

    @property
    def max_loops(self) -> Any:
        """The number itself, which inside a program may be traced."""
        return self.loops

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """All tokens at that loop."""
        return signals.loop >= self.loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class QExit:
    """Leave at the first loop with `CDF >= q`, asked as `log S <= log(1 - q)` (paper v4, section 3.2).

    q = 1 never leaves early.
    """

    q: float
    needs: ClassVar[Needs] = Needs.GATE
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.q <= 1.0:
            raise UserError(f"q must be in [0, 1], not {self.q}")

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Tokens whose survival has fallen to `1 - q`."""
        return signals.log_survival <= jnp.log1p(-jnp.asarray(self.q, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Another policy with a floor and a ceiling on loops; where the two disagree with it, they win.

    `max_loops=None` leaves the ceiling to the policy. Bounds of bounds become one, the outer ones winning.
    """

    policy: ExitPolicy
    _: dataclasses.KW_ONLY
    min_loops: int = 1
    max_loops: int | None = None

    def __post_init__(self) -> None:
        check_count("min_loops", self.min_loops)
        if self.max_loops is not None:
            check_count("max_loops", self.max_loops)
            if self.min_loops > self.max_loops:
                raise UserError(f"min_loops={self.min_loops} is above max_loops={self.max_loops}; lower it")
        self._merge()

    def _merge(self) -> None:
        """One floor and one ceiling, of these bounds and of what the policy itself asks for."""
        ceilings = [most for most in (self.max_loops, self.policy.max_loops) if most is not None]
        ceiling = max(min(ceilings), self.min_loops) if ceilings else None
        object.__setattr__(self, "max_loops", ceiling)
        if isinstance(self.policy, Bounded):
            floor = max(self.min_loops, self.policy.min_loops)
            object.__setattr__(self, "min_loops", floor if ceiling is None else min(floor, ceiling))
            object.__setattr__(self, "policy", self.policy.policy)

    @property
    def needs(self) -> Needs:
        """What the policy inside needs."""
        return self.policy.needs

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """What the policy says between the bounds; no token below the floor, every token at the ceiling."""
        ceiling = _MOST_LOOPS if self.max_loops is None else self.max_loops
        return between(self.policy.exits(signals), signals.loop, self.min_loops, ceiling)


ExitFunction = Callable[[Array, Array | None, Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class Custom:
    """A function of one's own: `function(t, hidden, gate_logits, logits)` says which tokens leave after loop t.

    It gets arrays `[*B]`, `[*B, D]`, `[*B]` and `[*B, V]`, whose rows may be at different loops, and returns booleans
    `[*B]`. `hidden` and `logits` may be None unless `needs` names them. It must be pure: it becomes part of the
    compiled program, so make it once and use it again.
    """

    function: ExitFunction
    _: dataclasses.KW_ONLY
    needs: Needs
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not (callable(self.function) and isinstance(self.function, Hashable)):
            raise UserError(f"Custom needs a function that can be hashed, not {self.function!r}")

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """What the function says. Raises UserError when that is not one boolean for each token."""
        leaves = self.function(signals.loop, signals.hidden, signals.gate_logits, signals.logits)
        shape, dtype = jnp.shape(leaves), jnp.result_type(leaves)
        if shape != signals.loop.shape or dtype != jnp.bool_:
            raise UserError(
                f"the function of a Custom exit policy must return bool{list(signals.loop.shape)}, one for each "
                f"token, not {dtype.name}{list(shape)}"
            )
        return jnp.asarray(leaves)


def between(
    leaves: Bool[Array, "*B"], loop: Int[Array, "*B"], floor: int | Int[Array, "*#B"], ceiling: int | Int[Array, "*#B"]
) -> Bool[Array, "*B"]:
    """`leaves` from loop `floor` on, and everything at loop `ceiling`."""
    return (leaves & (loop >= floor)) | (loop >= ceiling)


def check_count(name: str, value: Any) -> None:
    """Raise UserError for a number of loops that cannot be."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise UserError(f"{name} must be at least 1, not {value}")
    if value > _MOST_LOOPS:
        raise UserError(f"{name} must be at most {_MOST_LOOPS}, not {value}")


def required(signal: Float[Array, "*X"] | Int[Array, "*X"] | None, name: str) -> Array:
    """A signal that the policy's `needs` promise. Raises ValueError when the program did not compute it."""
    if signal is None:
        raise ValueError(f"this policy reads {name}, which was not computed: its needs were not respected")
    return signal
