"""Adapts a saved state to a recipe that differs in fields that may differ on resume."""

import dataclasses

import jax
import numpy as np

from looplm_jax.config import GuardConfig
from looplm_jax.training.guard import GuardState


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
