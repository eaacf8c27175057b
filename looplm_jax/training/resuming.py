"""Adapts a saved state to a recipe that differs in fields that may differ on resume."""

import dataclasses

import jax
import numpy as np

from looplm_jax.codec import leaves
from looplm_jax.config import GuardConfig, Recipe
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


def changed_settings(before: Recipe, now: Recipe, first: int) -> list[str]:
    """Returns a line for each stage from the one at index `first` on that is computed otherwise than before.

    The topology may be another one, the recipe may have other settings for it, or flags may have changed them.
    """
    lines = []
    for index in range(first, len(now.stages)):
        old, new = _how_computed(before, index), _how_computed(now, index)
        changes = [f"{path}: {old[path]}, now {value}" for path, value in new.items() if old[path] != value]
        if changes:
            lines.append(f"note: stage {now.stages[index].name} is computed with other settings: {'; '.join(changes)}")
    return lines


def _how_computed(recipe: Recipe, index: int) -> dict[str, object]:
    """Returns how a stage is computed: every field with its path in the recipe."""
    stage = recipe.stages[index]
    parts = {"mesh": recipe.mesh_of(stage), "compute": recipe.compute_of(stage)}
    fields = [leaf for name, config in parts.items() for leaf in leaves(config, name)]
    return {"accumulation": stage.accumulation} | {
        leaf.path: getattr(leaf.value, "value", leaf.value) for leaf in fields
    }
