"""The guard: a step whose loss or gradient is not finite, or whose loss is a spike, changes nothing."""

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import GuardConfig


@flax.struct.dataclass
class GuardState:
    """The last losses that were accepted, and what was skipped.

    Lives in the train state, so a resumed run goes on with it.
    """

    losses: Float[Array, "W"]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def initial_guard(config: GuardConfig) -> GuardState:
    """Nothing seen yet."""
    zero = jnp.zeros((), jnp.int32)
    return GuardState(
        losses=jnp.zeros((config.window,), jnp.float32), accepted=zero, skipped=zero, skipped_in_a_row=zero
    )


def next_stage_guard(state: GuardState) -> GuardState:
    """Forget the losses, which another objective would make meaningless; keep the counts."""
    zeros = jnp.zeros_like(state.losses)
    return dataclasses.replace(state, losses=zeros, accepted=jnp.zeros_like(state.accepted))


def is_sound(
    config: GuardConfig, state: GuardState, loss: Float[Array, ""], gradient_norm: Float[Array, ""]
) -> Bool[Array, ""]:
    """Finite, and not a spike: at most `sigma` standard deviations above the mean of a full window."""
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    limit = jnp.mean(state.losses) + config.sigma * jnp.std(state.losses)
    return finite & ((state.accepted < config.window) | (loss <= limit))


def update_guard(state: GuardState, loss: Float[Array, ""], sound: Bool[Array, ""]) -> GuardState:
    """Remember an accepted loss, or count a skipped step."""
    slot = state.accepted % state.losses.shape[0]
    one = sound.astype(jnp.int32)
    return GuardState(
        losses=state.losses.at[slot].set(jnp.where(sound, loss, state.losses[slot])),
        accepted=state.accepted + one,
        skipped=state.skipped + (1 - one),
        skipped_in_a_row=(state.skipped_in_a_row + 1) * (1 - one),
    )
