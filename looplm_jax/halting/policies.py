"""Exit policies: small frozen objects that decide, per token, the loop to leave at."""

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from looplm_jax.errors import UserError, suggest


@runtime_checkable
class ExitPolicy(Protocol):
    """Decides after each loop which tokens leave. The engine stops at `max_loops` whatever a policy says."""

    @property
    def max_loops(self) -> int | None:
        """The most loops this policy asks for; None leaves it to the model."""

    def exits(self, log_survival: Float[Array, "*B"], loop: int | Array) -> Bool[Array, "*B"]:
        """True for the tokens that leave after `loop` (1-based), given `log S_loop` of their gates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedLoops:
    """Every token takes the same number of loops."""

    loops: int

    def __post_init__(self) -> None:
        if self.loops < 1:
            raise UserError(f"loops must be at least 1, not {self.loops}")

    @property
    def max_loops(self) -> int:
        """The number itself."""
        return self.loops

    def exits(self, log_survival: Float[Array, "*B"], loop: int | Array) -> Bool[Array, "*B"]:
        """All tokens at once, at the last loop."""
        return jnp.full(log_survival.shape, jnp.asarray(loop) >= self.loops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QExit:
    """Leave at the first loop with `CDF >= q`, asked as `log S <= log(1 - q)` (paper v4, section 3.2).

    q = 1 never leaves early.
    """

    q: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.q <= 1.0:
            raise UserError(f"q must be in [0, 1], not {self.q}")

    @property
    def max_loops(self) -> None:
        """As many loops as the model is meant for."""
        return None

    def exits(self, log_survival: Float[Array, "*B"], loop: int | Array) -> Bool[Array, "*B"]:
        """Tokens whose survival has fallen to `1 - q`."""
        del loop
        return log_survival <= jnp.log1p(-jnp.float32(self.q))


def parse_exit_policy(text: str) -> ExitPolicy:
    """`loops=4` or `q=0.5`, as typed on a command line. Raises UserError for anything else."""
    name, _, value = text.partition("=")
    try:
        if name == "loops":
            return FixedLoops(loops=int(value))
        if name == "q":
            return QExit(q=float(value))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"exit policy {text!r}: {value!r} is not a number; write loops=4 or q=0.5") from None
    raise UserError(f"unknown exit policy {text!r}; write loops=4 or q=0.5{suggest(name, ['loops', 'q'])}")
