"""The guard: a step whose loss or gradient is not finite, or whose loss is a spike, changes nothing.

What recurs is no spike. The window also learns the losses that were skipped, and a loss is compared with the window
without the highest 1 in 64: so few high losses leave the limit where it was, and more of them show that they belong to
the data, such as a harder source of the mixture. Of several skips in a row only the first is learned, so a run whose
loss stays high is stopped after `guard.patience` steps instead of getting used to it.
"""

import dataclasses
import math

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import GuardConfig

_ONE_IN = 64  # of the losses of a window are set aside: its highest, which the limit does not follow
_FAMILIAR = 2.0  # a loss up to this many times as far above the mean as the highest of the others is no spike


@flax.struct.dataclass
class GuardState:
    """The latest losses, and what was skipped.

    Lives in the train state, so a resumed run makes the same decisions.

    Attributes:
      losses: the window, a ring: accepted losses, and the first of each row of skipped ones.
      accepted: losses that entered the window since the stage began.
      skipped: steps skipped since the run began.
      skipped_in_a_row: steps skipped since the last accepted one.
    """

    losses: Float[Array, "W"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def initial_guard(config: GuardConfig) -> GuardState:
    """Returns the state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return GuardState(
        losses=jnp.zeros((config.window,), jnp.float32), accepted=zero, skipped=zero, skipped_in_a_row=zero
    )


def next_stage_guard(state: GuardState) -> GuardState:
    """Forgets the losses, which another objective would make meaningless; keeps the counts."""
    zeros = jnp.zeros_like(state.losses)
    return dataclasses.replace(state, losses=zeros, accepted=jnp.zeros_like(state.accepted))


def is_sound(
    config: GuardConfig, state: GuardState, loss: Float[Array, ""], gradient_norm: Float[Array, ""]
) -> Bool[Array, ""]:
    """Returns whether loss and gradient are finite and, once the window is full, the loss is at most its limit."""
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    return finite & ((state.accepted < state.losses.shape[0]) | (loss <= spike_limit(config, state.losses)))


def spike_limit(config: GuardConfig, losses: Float[Array, "W"]) -> Float[Array, ""]:
    """Returns the largest loss that is no spike after a full window.

    Of the window without its highest losses, that is the mean and `sigma` standard deviations, or twice the distance
    from the mean to the highest of those that are left, where that is more.
    """
    window = losses.shape[0]
    aside = min(math.ceil(window / _ONE_IN), window // 4)
    usual = jnp.sort(losses)[: window - aside]
    mean = jnp.mean(usual)
    return mean + jnp.maximum(config.sigma * jnp.std(usual), _FAMILIAR * (usual[-1] - mean))


def update_guard(state: GuardState, loss: Float[Array, ""], sound: Bool[Array, ""]) -> GuardState:
    """Returns the state after an accepted or a skipped step."""
    learned = jnp.isfinite(loss) & (sound | (state.skipped_in_a_row == 0))
    slot = state.accepted % state.losses.shape[0]
    one = sound.astype(jnp.int32)
    return GuardState(
        losses=state.losses.at[slot].set(jnp.where(learned, loss, state.losses[slot])),
        accepted=state.accepted + learned.astype(jnp.int32),
        skipped=state.skipped + (1 - one),
        skipped_in_a_row=(state.skipped_in_a_row + 1) * (1 - one),
    )
