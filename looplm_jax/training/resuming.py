"""A saved state for a recipe that differs in what may differ on resume."""

import dataclasses

import jax
import numpy as np

from looplm_jax.config import GuardConfig
from looplm_jax.training.guard import GuardState


def with_window(guard: GuardState, config: GuardConfig) -> GuardState:
    """Returns a guard whose window has the size of `config`, with as many of the newest losses as fit."""
    losses, accepted = np.asarray(guard.losses), int(guard.accepted)
    if losses.size == config.window:
        return guard
    in_order = losses[:accepted] if accepted < losses.size else np.roll(losses, -(accepted % losses.size))
    newest = in_order[max(0, in_order.size - config.window) :]
    padded = np.pad(newest, (0, config.window - newest.size))
    return dataclasses.replace(
        guard,
        losses=jax.device_put(padded, guard.losses.sharding),
        accepted=jax.device_put(np.int32(newest.size), guard.accepted.sharding),
    )
