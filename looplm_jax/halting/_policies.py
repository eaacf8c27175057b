"""Exit policies: small frozen objects that decide, per token, at which loop to exit.

A user-defined policy is a frozen dataclass of `int`, `float` and `bool` fields with the members of `ExitPolicy`.
Policies that read states or predictions compute in float32 and log space. No token exits at loop 1 by a policy that
compares with the previous loop, unless the policy says with what loop 1 is compared.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.halting.signals import Needs, Signals

# Numbers of loops are 32-bit integers in programs.
_MOST_LOOPS = 2**31 - 1
# The share of the largest probability below which `MinPDivergence` replaces those of other tokens.
_MIN_P = 0.1


# Policies that read the number of the loop or the gate, and wrappers


@runtime_checkable
class ExitPolicy(Protocol):
    """Decides after each loop which tokens exit. Every token exits at the last loop, whatever the policy.

    An own policy is a frozen dataclass of numeric fields with these members. Engines compile once per class
    of policy; other values of its fields compile nothing. For a single function, use `Custom`.

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class GateAbove:
            threshold: float
            needs: ClassVar[Needs] = Needs.GATE
            max_loops: ClassVar[None] = None

            def exits(self, signals: Signals) -> Array:
                return signals.gate_logits > self.threshold
    """

    @property
    def needs(self) -> Needs:
        """The signals that the policy reads in addition to the number of the loop.

        They are the same for every object of a class, except for `Custom`.
        """

    @property
    def max_loops(self) -> int | None:
        """The largest number of loops of this policy; None leaves it to the model."""

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for the tokens that exit.

        Policies that compare with the previous loop return False at loop 1.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedLoops:
    """Every token exits after the same number of loops."""

    loops: int
    needs: ClassVar[Needs] = Needs(0)

    def __post_init__(self) -> None:
        check_count("loops", self.loops)

    @property
    def max_loops(self) -> Any:
        """The number of loops, which may be a tracer inside a program."""
        return self.loops

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for all tokens from that loop on."""
        return signals.loop >= self.loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class QExit:
    """Exits at the first loop with `CDF >= q`, tested as `log S <= log(1 - q)` (paper v4, section 3.2).

    With q = 1 no token exits early.
    """

    q: float
    needs: ClassVar[Needs] = Needs.GATE
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.q <= 1.0:
            raise UserError(f"q must be in [0, 1], not {self.q}")

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens whose survival is at most `1 - q`."""
        # In log space a survival does not underflow to 0, so no token exits early with q = 1.
        return signals.log_survival <= jnp.log1p(-jnp.asarray(self.q, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledExit:
    """Draws the exit loop of each token from its exit distribution: `P(exit at t) = p_t`.

    This is Q-exit with a random q: a number u, uniform in [0, 1), for each token. The engine draws it with a key of its
    own, which follows from `Sampling.seed`, `index`, `sample` and the number of the token; `exit_loops` takes it as an
    argument. `log_exit_probability` is the log-probability of a drawn exit.
    """

    needs: ClassVar[Needs] = Needs.GATE | Needs.DRAW
    max_loops: ClassVar[None] = None

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens whose survival is at most `1 - u`."""
        return signals.log_survival <= jnp.log1p(-required(signals.draw, "random numbers"))


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A policy with bounds on the number of loops, which take precedence over the policy.

    With `max_loops=None` the policy determines the upper bound. Nested bounds are merged; the outer ones take
    precedence.

    Attributes:
      policy: the policy.
      min_loops: no token exits before this loop.
      max_loops: every token exits at this loop.
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

        # Merged, so that a table of policies has one column for each bound.
        self._merge()

    def _merge(self) -> None:
        """Merges these bounds with those of the policy into one lower and one upper bound."""
        # The smaller upper bound applies, raised to the outer lower bound if necessary.
        ceilings = [most for most in (self.max_loops, self.policy.max_loops) if most is not None]
        ceiling = max(min(ceilings), self.min_loops) if ceilings else None
        # The dataclass is frozen.
        object.__setattr__(self, "max_loops", ceiling)

        if isinstance(self.policy, Bounded):
            # The inner lower bound must not exceed the outer upper one.
            floor = max(self.min_loops, self.policy.min_loops)
            object.__setattr__(self, "min_loops", floor if ceiling is None else min(floor, ceiling))
            object.__setattr__(self, "policy", self.policy.policy)

    @property
    def needs(self) -> Needs:
        """The needs of the inner policy."""
        return self.policy.needs

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns the decision of the policy between the bounds, False below them and True at the upper one."""
        ceiling = _MOST_LOOPS if self.max_loops is None else self.max_loops
        return between(self.policy.exits(signals), signals.loop, self.min_loops, ceiling)


ExitFunction = Callable[[Array, Array | None, Array, Array | None], Array]


@dataclasses.dataclass(frozen=True)
class Custom:
    """A policy from a function: `function(t, hidden, gate_logits, logits)` returns which tokens exit after loop t.

        from looplm_jax.halting.signals import Needs

        def small_state(t, hidden, gate_logits, logits):
            return jnp.linalg.norm(hidden.astype(jnp.float32), axis=-1) < 3.0

        policy = Custom(small_state, needs=Needs.HIDDEN)

    The function receives arrays `[*B]`, `[*B, D]`, `[*B]` and `[*B, V]` and returns booleans `[*B]`. Tokens may be at
    different loops. `hidden` and `logits` may be None unless `needs` includes them. The function must be pure, because
    it becomes part of the compiled program. Create a policy once and reuse it: each new function is compiled again.
    """

    function: ExitFunction
    _: dataclasses.KW_ONLY
    needs: Needs
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not (callable(self.function) and isinstance(self.function, Hashable)):
            raise UserError(f"Custom needs a function that can be hashed, not {self.function!r}")

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns the result of the function. Raises UserError if that is not one boolean per token."""
        leaves = self.function(signals.loop, signals.hidden, signals.gate_logits, signals.logits)

        shape, dtype = jnp.shape(leaves), jnp.result_type(leaves)
        if shape != signals.loop.shape or dtype != jnp.bool_:
            raise UserError(
                f"the function of a Custom exit policy must return bool{list(signals.loop.shape)}, one for each "
                f"token, not {dtype.name}{list(shape)}"
            )

        return jnp.asarray(leaves)


# Policies that read the change since the previous loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ChangeBelow:
    """Exits when the change since the previous loop is below a threshold."""

    threshold: float
    needs: ClassVar[Needs]
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and np.isfinite(self.threshold)):
            raise UserError(f"the threshold of {type(self).__name__} must be positive, not {self.threshold}")
        # Thresholds become float32 in programs: a smaller one would be 0, with which no token ever exits.
        if not np.finfo(np.float32).tiny <= self.threshold <= np.finfo(np.float32).max:
            raise UserError(f"the threshold of {type(self).__name__} is beyond float32: {self.threshold}")

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns the change since the previous loop; ignored at loop 1."""
        raise NotImplementedError

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens whose change is below the threshold."""
        # At loop 1 there is no previous loop to compare with.
        return (signals.loop > 1) & (self.change(signals) < self.threshold)


class HiddenDifference(_ChangeBelow):
    """Exits when `||h_t - h_{t-1}||_2 < threshold`."""

    needs = Needs.HIDDEN

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `||h_t - h_{t-1}||_2`."""
        return _norm(_hidden(signals) - _previous_hidden(signals))


class RelativeHiddenDifference(_ChangeBelow):
    """Exits when `||h_t - h_{t-1}||_2 / ||h_t||_2 < threshold` (Huginn: 0.03)."""

    needs = Needs.HIDDEN

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `||h_t - h_{t-1}||_2 / ||h_t||_2`."""
        hidden = _hidden(signals)
        # The maximum avoids a division by zero.
        return _norm(hidden - _previous_hidden(signals)) / jnp.maximum(_norm(hidden), jnp.finfo(jnp.float32).tiny)


class RelativeStateDifference(_ChangeBelow):
    """Exits when `||s_t - s_{t-1}||_2 / ||s_t||_2 < threshold`, of the states before the coda (Huginn: 0.03).

    Without a coda and with a norm in every loop, that is `RelativeHiddenDifference`.
    """

    needs = Needs.STATE

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `||s_t - s_{t-1}||_2 / ||s_t||_2`."""
        state, previous = _states(signals)
        # The maximum avoids a division by zero.
        return _norm(state - previous) / jnp.maximum(_norm(state), jnp.finfo(jnp.float32).tiny)


class CosineChange(_ChangeBelow):
    """Exits when `1 - cos(s_t, s_{t-1}) < threshold`, of the states before the coda (Huginn: 1e-3)."""

    needs = Needs.STATE

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `1 - cos(s_t, s_{t-1})`."""
        directions = [
            state / jnp.maximum(_norm(state), jnp.finfo(jnp.float32).tiny)[..., None] for state in _states(signals)
        ]
        # Equals half the squared distance of the unit vectors, which does not cancel where the cosine is close to 1.
        return 0.5 * jnp.sum(jnp.square(directions[0] - directions[1]), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _DivergenceBelow(_ChangeBelow):
    """Exits when a divergence from the previous prediction is below a threshold."""

    from_uniform: bool = False
    needs: ClassVar[Needs] = Needs.PREVIOUS_LOGITS

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens whose divergence is below the threshold; at loop 1 only with `from_uniform`."""
        return ((signals.loop > 1) | self.from_uniform) & (self.change(signals) < self.threshold)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLDivergence(_DivergenceBelow):
    """Exits when `KL(p_t || p_{t-1}) < threshold`, in nats, between consecutive predictions.

    Huginn's published code has `reverse=True, from_uniform=True`, and thresholds from 5e-4 to 1e-3.

    Attributes:
      threshold: the divergence below which a token exits.
      reverse: whether the divergence is `KL(p_{t-1} || p_t)`.
      from_uniform: whether loop 1 compares with the uniform distribution; otherwise no token exits at loop 1.
    """

    reverse: bool = False

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `KL(p_t || p_{t-1})`, or its reverse."""
        log_p, log_previous = _log_probs(signals), _previous_log_probs(signals)
        reverse = jnp.asarray(self.reverse)
        # A number for each token needs an axis for the vocabulary.
        reverse = reverse[..., None] if reverse.ndim else reverse
        log_p, log_previous = (
            jnp.where(reverse, log_previous, log_p),
            jnp.where(reverse, log_p, log_previous),
        )
        # KL(p || q) = sum_v p_v (log p_v - log q_v).
        return _expectation(log_p, log_p - log_previous)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinPDivergence(_DivergenceBelow):
    """Exits when `KL(q_{t-1} || q_t) < threshold`, in nats, of predictions without their tails (Huginn: 1e-5).

    In q, tokens with less than 0.1 of the largest probability have probability 1/V, before q is normalized. Huginn's
    published code has `from_uniform=True`.

    Attributes:
      threshold: the divergence below which a token exits.
      from_uniform: whether loop 1 compares with the uniform distribution; otherwise no token exits at loop 1.
    """

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `KL(q_{t-1} || q_t)`."""
        log_q, log_previous = _without_tail(_log_probs(signals)), _without_tail(_previous_log_probs(signals))
        return _expectation(log_previous, log_previous - log_q)


class EntropyChange(_ChangeBelow):
    """Exits when `|H(p_t) - H(p_{t-1})| < threshold`, in nats."""

    needs = Needs.PREVIOUS_LOGITS

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `|H(p_t) - H(p_{t-1})|`."""
        log_p, log_previous = _log_probs(signals), _previous_log_probs(signals)
        # The signs of the two entropies cancel in the absolute value.
        return jnp.abs(_expectation(log_p, log_p) - _expectation(log_previous, log_previous))


# Policies that read predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArgmaxStable:
    """Exits when the most probable token was the same as in the previous loop, `times` times in a row."""

    times: int
    needs: ClassVar[Needs] = Needs.LOGITS
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_count("times", self.times)

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens whose prediction was unchanged at least that often."""
        return required(signals.unchanged, "the count of unchanged predictions") >= self.times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence:
    """Exits when the most probable token has at least this probability."""

    probability: float
    needs: ClassVar[Needs] = Needs.LOGITS
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.probability <= 1.0:
            raise UserError(f"probability must be in [0, 1], not {self.probability}")

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens with at least this probability."""
        return jnp.max(_log_probs(signals), axis=-1) >= jnp.log(jnp.asarray(self.probability, jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Margin:
    """Exits when the most probable token exceeds the second by at least this probability."""

    margin: float
    needs: ClassVar[Needs] = Needs.LOGITS
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.margin <= 1.0:
            raise UserError(f"margin must be in [0, 1], not {self.margin}")

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens with at least this margin."""
        log_p = _log_probs(signals)
        best = jnp.argmax(log_p, axis=-1, keepdims=True)
        # Without the best token itself, so that two equally probable tokens have a margin of 0.
        tokens = jnp.arange(log_p.shape[-1]).reshape(*[1] * (log_p.ndim - 1), -1)
        others = jnp.where(tokens == best, -jnp.inf, log_p)
        lead = jnp.exp(jnp.max(log_p, axis=-1)) - jnp.exp(jnp.max(others, axis=-1))
        return lead >= self.margin


# Signals in float32


def _hidden(signals: Signals) -> Float[Array, "*B D"]:
    return required(signals.hidden, "hidden states").astype(jnp.float32)


def _previous_hidden(signals: Signals) -> Float[Array, "*B D"]:
    return required(signals.previous_hidden, "hidden states").astype(jnp.float32)


def _states(signals: Signals) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """Returns the states before the coda after this loop and after the previous one."""
    name = "states before the coda"
    return (
        required(signals.state, name).astype(jnp.float32),
        required(signals.previous_state, name).astype(jnp.float32),
    )


def _log_probs(signals: Signals) -> Float[Array, "*B V"]:
    return jax.nn.log_softmax(required(signals.logits, "logits").astype(jnp.float32))


def _previous_log_probs(signals: Signals) -> Float[Array, "*B V"]:
    return jax.nn.log_softmax(required(signals.previous_logits, "logits").astype(jnp.float32))


def _without_tail(log_p: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Returns log-probabilities with those below `_MIN_P` of the largest set to 1/V, normalized."""
    floor = jnp.max(log_p, axis=-1, keepdims=True) + math.log(_MIN_P)
    return jax.nn.log_softmax(jnp.where(log_p < floor, -math.log(log_p.shape[-1]), log_p))


def _norm(vector: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    return jnp.linalg.norm(vector, axis=-1)


def _expectation(log_p: Float[Array, "*B V"], values: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns `sum_v p_v value_v`. Tokens of probability 0 contribute 0 even if their value is infinite."""
    # 0 times infinity would be NaN.
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * values, 0.0), axis=-1)


# Helpers


def between(
    leaves: Bool[Array, "*B"], loop: Int[Array, "*B"], floor: int | Int[Array, "*#B"], ceiling: int | Int[Array, "*#B"]
) -> Bool[Array, "*B"]:
    """Returns `leaves` from loop `floor` on, and True from loop `ceiling` on."""
    return (leaves & (loop >= floor)) | (loop >= ceiling)


def check_count(name: str, value: Any) -> None:
    """Raises UserError if `value` is not a valid number of loops."""
    # `__index__` accepts NumPy integers and refuses floats.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise UserError(f"{name} must be at least 1, not {value}")
    if value > _MOST_LOOPS:
        raise UserError(f"{name} must be at most {_MOST_LOOPS}, not {value}")


def required(signal: Float[Array, "*X"] | Int[Array, "*X"] | None, name: str) -> Array:
    """Returns a signal that the policy's `needs` include. Raises ValueError if the program did not compute it."""
    if signal is None:
        raise ValueError(f"this policy reads {name}, which was not computed: its needs were not respected")
    return signal
