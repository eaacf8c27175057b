"""Exit policies that read states and predictions instead of the gate.

They compute in float32 and log space. No token exits at loop 1 by a policy that compares with the previous loop.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from looplm_jax.errors import UserError
from looplm_jax.halting.policies import check_count, required
from looplm_jax.halting.signals import Needs, Signals

# Changes between loops


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SmallChange:
    """Exits when the change since the previous loop is below a threshold."""

    threshold: float
    needs: ClassVar[Needs]
    max_loops: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not (self.threshold > 0 and np.isfinite(self.threshold)):
            raise UserError(f"the threshold of {type(self).__name__} must be positive, not {self.threshold}")
        if not np.finfo(np.float32).tiny <= self.threshold <= np.finfo(np.float32).max:
            raise UserError(f"the threshold of {type(self).__name__} is beyond float32: {self.threshold}")

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns the change since the previous loop; ignored at loop 1."""
        raise NotImplementedError

    def exits(self, signals: Signals) -> Bool[Array, "*B"]:
        """Returns True for tokens whose change is below the threshold."""
        return (signals.loop > 1) & (self.change(signals) < self.threshold)


class HiddenDifference(_SmallChange):
    """Exits when `||h_t - h_{t-1}||_2 < threshold`."""

    needs = Needs.HIDDEN

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `||h_t - h_{t-1}||_2`."""
        return _norm(_hidden(signals) - _previous_hidden(signals))


class RelativeHiddenDifference(_SmallChange):
    """Exits when `||h_t - h_{t-1}||_2 / ||h_t||_2 < threshold` (Huginn: 0.03)."""

    needs = Needs.HIDDEN

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `||h_t - h_{t-1}||_2 / ||h_t||_2`."""
        hidden = _hidden(signals)
        # The maximum avoids a division by zero.
        return _norm(hidden - _previous_hidden(signals)) / jnp.maximum(_norm(hidden), jnp.finfo(jnp.float32).tiny)


class KLDivergence(_SmallChange):
    """Exits when `KL(p_t || p_{t-1}) < threshold`, in nats, between consecutive predictions (Huginn: 5e-4 to 1e-3)."""

    needs = Needs.PREVIOUS_LOGITS

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `KL(p_t || p_{t-1})`."""
        log_p, log_previous = _log_probs(signals), _previous_log_probs(signals)
        return _expectation(log_p, log_p - log_previous)


class EntropyChange(_SmallChange):
    """Exits when `|H(p_t) - H(p_{t-1})| < threshold`, in nats."""

    needs = Needs.PREVIOUS_LOGITS

    def change(self, signals: Signals) -> Float[Array, "*B"]:
        """Returns `|H(p_t) - H(p_{t-1})|`."""
        log_p, log_previous = _log_probs(signals), _previous_log_probs(signals)
        return jnp.abs(_expectation(log_p, log_p) - _expectation(log_previous, log_previous))


# Predictions


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
        others = jnp.where(jnp.arange(log_p.shape[-1]) == best, -jnp.inf, log_p)
        lead = jnp.exp(jnp.max(log_p, axis=-1)) - jnp.exp(jnp.max(others, axis=-1))
        return lead >= self.margin


# Values in float32


def _hidden(signals: Signals) -> Float[Array, "*B D"]:
    return required(signals.hidden, "hidden states").astype(jnp.float32)


def _previous_hidden(signals: Signals) -> Float[Array, "*B D"]:
    return required(signals.previous_hidden, "hidden states").astype(jnp.float32)


def _log_probs(signals: Signals) -> Float[Array, "*B V"]:
    return jax.nn.log_softmax(required(signals.logits, "logits").astype(jnp.float32))


def _previous_log_probs(signals: Signals) -> Float[Array, "*B V"]:
    return jax.nn.log_softmax(required(signals.previous_logits, "logits").astype(jnp.float32))


def _norm(vector: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    return jnp.linalg.norm(vector, axis=-1)


def _expectation(log_p: Float[Array, "*B V"], values: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Returns `sum_v p_v value_v`. Tokens of probability 0 contribute 0 even if their value is infinite."""
    p = jnp.exp(log_p)
    return jnp.sum(jnp.where(p > 0, p * values, 0.0), axis=-1)
