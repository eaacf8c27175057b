"""Settings of recipes for topologies: which exist, and which a command uses."""

import dataclasses
from collections.abc import Collection

from looplm_jax.config import MeshConfig, Recipe, Stage, TopologySettings
from looplm_jax.errors import UserError, suggest

NONE = "none"  # the value of `topology` with which no settings are used


def known_topologies(recipe: Recipe) -> tuple[str, ...]:
    """Returns the topologies for which any stage has settings."""
    return tuple(dict.fromkeys(each.topology for stage in recipe.stages for each in stage.settings))


def on_topology(recipe: Recipe, topology: str, given: Collection[str] = ()) -> Recipe:
    """Returns the recipe for a topology: each stage uses its settings for it, if it has any.

    Args:
      recipe: the recipe, including the fields that the user gave.
      topology: the topology of the devices. If the user gave the field `topology`, that is used instead.
      given: dotted paths of the fields that the user gave, such as `compute.remat` or `stage.accumulation`. They take
        precedence over the settings.

    Raises:
      UserError: the user gave a topology for which no stage has settings.
    """
    known = known_topologies(recipe)

    if "topology" in given:
        topology = recipe.topology
        if topology not in (NONE, *known):
            hint = suggest(topology, (*known, NONE))
            raise UserError(f"no stage of recipe {recipe.name!r} has settings for topology {topology!r}{hint}")

    # A recipe without settings is the same on every topology.
    if not known:
        return recipe

    recipe = dataclasses.replace(recipe, topology=topology)
    return dataclasses.replace(recipe, stages=tuple(_with_settings(recipe, stage, given) for stage in recipe.stages))


def settings_in_use(recipe: Recipe) -> str | None:
    """Returns a line about the stages that use settings for the recipe's topology, or None if no settings apply."""
    known = known_topologies(recipe)
    if not known or recipe.topology == NONE:
        return None

    using = [stage.name for stage in recipe.stages if recipe.settings_of(stage) is not None]
    if not using:
        return (
            f"note: recipe {recipe.name} has no settings for {recipe.topology} (only for {', '.join(known)}); "
            "using its compute and mesh"
        )

    which = "" if len(using) == len(recipe.stages) else f" in {', '.join(using)}"
    return f"using the recipe's settings for {recipe.topology}{which}"


def with_settings(stage: Stage, settings: TopologySettings) -> Stage:
    """Returns the stage with these settings, which replace those for the same topology."""
    others = tuple(each for each in stage.settings if each.topology != settings.topology)
    return dataclasses.replace(stage, settings=(*others, settings))


def _with_settings(recipe: Recipe, stage: Stage, given: Collection[str]) -> Stage:
    """Returns the stage with its settings for the recipe's topology, except for the fields that were given."""
    settings = recipe.settings_of(stage)
    if settings is None:
        return stage

    # Settings replace whole configurations, so the fields that the user gave are put back one by one.
    named = {name for name in given if name.startswith("compute.")}
    compute = {name: getattr(recipe.compute, name) for name in (path.partition(".")[2] for path in named)}
    used = dataclasses.replace(
        settings,
        accumulation=stage.accumulation if _is_given(stage, "accumulation", given) else settings.accumulation,
        mesh=_mesh(recipe, stage, settings, given),
        compute=dataclasses.replace(settings.compute, **compute),
    )
    return dataclasses.replace(with_settings(stage, used), accumulation=used.accumulation)


def _mesh(recipe: Recipe, stage: Stage, settings: TopologySettings, given: Collection[str]) -> MeshConfig:
    """Returns the mesh of a stage: that of its settings, or of the recipe if any of its axes was given.

    The axes of a mesh depend on each other, so one of them cannot be replaced alone.
    """
    from_recipe = any(path.startswith("mesh.") for path in given)
    mesh = recipe.mesh if from_recipe else settings.mesh
    if stage.context and (from_recipe or _is_given(stage, "context", given)):
        return mesh.with_context(stage.context)
    return mesh


def _is_given(stage: Stage, field: str, given: Collection[str]) -> bool:
    """Whether the user gave a field of a stage, for this stage or for all."""
    return f"stage.{field}" in given or f"stages.{stage.name}.{field}" in given
