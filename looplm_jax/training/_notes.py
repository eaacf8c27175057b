"""Notes about a recipe for the user: settings without effect, and settings that changed since the run was saved."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from looplm_jax.codec import leaves
from looplm_jax.config import Gradient, Objective, PriorKind, Recipe, Schedule, Stage

_GATE_FIELDS = ("gate_target", "gain_slope", "gain_threshold")
_PRIOR_FIELDS = {PriorKind.UNIFORM: (), PriorKind.GEOMETRIC: ("rate",), PriorKind.POISSON_LOG_NORMAL: ("mean", "sigma")}


def settings_without_effect(recipe: Recipe) -> list[str]:
    """Returns one note for each group of fields that differ from their defaults and have no effect."""
    # Notes, not errors: the fields are valid, and recipes are often edited one field at a time.
    notes = [note for stage in recipe.stages for note in _of_stage(stage)]
    if recipe.data.validation_fraction == 0 and (fields := _changed(recipe.evaluation, ("every", "sequences"))):
        notes.append(_note("evaluation", fields, "data.validation_fraction=0"))
    return notes


def _of_stage(stage: Stage) -> Iterator[str]:
    """Yields the notes about a stage."""
    where = f"stages.{stage.name}"
    for fields, because in (*_of_schedule(stage), *_of_objective(stage)):
        if changed := _changed(stage, fields):
            yield _note(where, changed, because)

    # Eq. 4 uses the prior, but not every field of it.
    if stage.objective is Objective.EXPECTED_LOSS:
        kind = stage.prior.kind
        unused = tuple(name for name in ("rate", "mean", "sigma") if name not in _PRIOR_FIELDS[kind])
        if changed := _changed(stage.prior, unused):
            yield _note(f"{where}.prior", changed, f"kind={kind.value}")

    if _never_decays(stage):
        yield f"note: {where}: schedule={stage.schedule.value} never decays: {_never_decays(stage)}"


def _of_schedule(stage: Stage) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields fields that the schedule does not use, and the reason."""
    match stage.schedule:
        case Schedule.CONSTANT:
            yield ("decay_steps", "final_learning_rate"), "schedule=constant"
        case Schedule.COSINE:
            yield ("decay_steps",), "schedule=cosine"
            if _never_decays(stage):
                yield ("final_learning_rate",), _never_decays(stage)
        case Schedule.WARMUP_STABLE_DECAY if stage.decay_steps == 0:
            yield ("final_learning_rate",), "decay_steps=0"


def _of_objective(stage: Stage) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields fields that the objective does not use, and the reason."""
    because = f"objective={stage.objective.value}"
    if stage.objective is not Objective.GATE:
        yield _GATE_FIELDS, because
    if stage.objective is not Objective.EXPECTED_LOSS:
        yield ("beta", "prior"), because
    if stage.objective is not Objective.PONDER:
        yield ("ponder_weight", "act_epsilon"), because
    if stage.gradient is Gradient.UNROLLED:
        yield ("solver",), "gradient=unrolled"
    if stage.objective is not Objective.LOOPRPT:
        yield ("looprpt",), because
    if stage.objective is not Objective.POLICY_GRADIENT:
        yield ("policy",), because


def _never_decays(stage: Stage) -> str:
    """Returns why a decaying schedule stays at its peak rate, or an empty string if it decays."""
    if stage.schedule is Schedule.WARMUP_STABLE_DECAY and stage.decay_steps == 0:
        return "decay_steps=0"
    # The cosine begins after the warm-up, or after the first step without one.
    if stage.schedule is Schedule.COSINE and stage.steps <= max(stage.warmup_steps, 1):
        return f"warmup_steps={stage.warmup_steps} leaves none of steps={stage.steps}"
    return ""


def _changed(config: Any, names: tuple[str, ...]) -> list[str]:
    """Returns `name=value` for each named field that differs from its default."""
    fields = {field.name: field for field in dataclasses.fields(config) if field.name in names}
    return [
        f"{name}={_shown(getattr(config, name))}"
        for name, field in fields.items()
        if getattr(config, name) != _default(field)
    ]


def _default(field: dataclasses.Field) -> Any:
    factory: Any = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _shown(value: Any) -> str:
    """Returns a value as text; nested dataclasses are abbreviated."""
    if dataclasses.is_dataclass(value):
        return "(...)"
    return str(getattr(value, "value", value))


def _note(where: str, fields: list[str], because: str) -> str:
    verb = "have" if len(fields) > 1 else "has"
    return f"note: {where}: {' and '.join(fields)} {verb} no effect with {because}"


# Resuming


def changed_settings(before: Recipe, now: Recipe, first: int) -> list[str]:
    """Returns a line for each stage from the one at index `first` on that is computed otherwise than before.

    The topology may be another one, the recipe may have other settings for it, or flags may have changed them.
    """
    lines = []
    for index in range(first, len(now.stages)):
        # Stages before `first` are finished, so how they would be computed does not matter.
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
