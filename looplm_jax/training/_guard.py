"""The guard: a step whose loss or gradient is not finite, or whose loss is a spike, is skipped.

Losses that recur are not spikes. The window therefore also contains losses of skipped steps, and a loss is compared
with the window without its highest 1 in 64: a few high losses leave the limit unchanged, while more of them show that
they are part of the data, such as a harder source of the mixture. Of several consecutive skips only the first enters
the window, so a run whose loss stays high is stopped after `guard.patience` steps instead of adapting to it.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import GuardConfig

_ONE_IN = 64  # the highest 1 in 64 losses of the window do not influence the limit
_FAMILIAR = 2.0  # times the distance from the mean to the highest remaining loss: losses up to there are not spikes


@flax.struct.dataclass
class GuardState:
    """The latest losses, and counts of skipped steps.

    It is part of the train state, so a resumed run makes the same decisions.

    Attributes:
      losses: the window, a ring buffer of the losses of accepted steps and of the first of consecutive skipped ones.
      accepted: the number of losses that entered the window since the stage began.
      skipped: the number of steps skipped since the run began.
      skipped_in_a_row: the number of steps skipped since the last accepted one.
    """

    losses: Float[Array, "W"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def initial_guard(config: GuardConfig) -> GuardState:
    """Returns the state before the first step."""
    losses, zero = jnp.zeros((config.window,), jnp.float32), jnp.zeros((), jnp.int32)
    return GuardState(losses=losses, accepted=zero, skipped=zero, skipped_in_a_row=zero)


def next_stage_guard(state: GuardState) -> GuardState:
    """Returns the state at the start of the next stage.

    The losses are cleared, because another objective has other losses. The counts are kept.
    """
    # With no loss accepted, there is no limit until the window is full again.
    zeros = jnp.zeros_like(state.losses)
    return dataclasses.replace(state, losses=zeros, accepted=jnp.zeros_like(state.accepted))


def with_window(guard: GuardState, config: GuardConfig) -> GuardState:
    """Returns a guard whose window has the size in `config`, filled with as many of the latest losses as fit."""
    losses, accepted = np.asarray(guard.losses), int(guard.accepted)
    if losses.size == config.window:
        return guard

    # The window is a ring buffer: oldest losses first after the roll.
    in_order = losses[:accepted] if accepted < losses.size else np.roll(losses, -(accepted % losses.size))

    newest = in_order[max(0, in_order.size - config.window) :]
    padded = np.pad(newest, (0, config.window - newest.size))

    return dataclasses.replace(
        guard,
        losses=jax.device_put(padded, guard.losses.sharding),
        accepted=jax.device_put(np.int32(newest.size), guard.accepted.sharding),
    )


def is_accepted(
    config: GuardConfig, state: GuardState, loss: Float[Array, ""], gradient_norm: Float[Array, ""]
) -> Bool[Array, ""]:
    """Whether loss and gradient are finite and, once the window is full, the loss does not exceed its limit."""
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    # Until the window is full there is no limit.
    return finite & ((state.accepted < state.losses.shape[0]) | (loss <= spike_limit(config, state.losses)))


def spike_limit(config: GuardConfig, losses: Float[Array, "W"]) -> Float[Array, ""]:
    """Returns the largest loss that is not a spike, given a full window.

    The highest losses of the window are excluded. The limit is the mean of the remaining ones plus the larger of
    `sigma` standard deviations and twice the distance from the mean to the highest of them.
    """
    window = losses.shape[0]
    # Of a small window at most a quarter is excluded.
    aside = min(math.ceil(window / _ONE_IN), window // 4)

    usual = jnp.sort(losses)[: window - aside]
    mean = jnp.mean(usual)
    return mean + jnp.maximum(config.sigma * jnp.std(usual), _FAMILIAR * (usual[-1] - mean))


def update_guard(state: GuardState, loss: Float[Array, ""], accepted: Bool[Array, ""]) -> GuardState:
    """Returns the state after an accepted or a skipped step."""
    # Of consecutive skipped losses only the first enters the window.
    learned = jnp.isfinite(loss) & (accepted | (state.skipped_in_a_row == 0))

    slot = state.accepted % state.losses.shape[0]

    one = accepted.astype(jnp.int32)

    return GuardState(
        losses=state.losses.at[slot].set(jnp.where(learned, loss, state.losses[slot])),
        accepted=state.accepted + learned.astype(jnp.int32),
        skipped=state.skipped + (1 - one),
        skipped_in_a_row=(state.skipped_in_a_row + 1) * (1 - one),
    )
