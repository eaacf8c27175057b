"""Recipes: complete training runs by name, as `looplm train --recipe NAME` starts them.

A recipe is a `looplm_jax.config.Recipe`: the model, its stages, the data, and how it is computed and saved. It is a
frozen dataclass, so a variation is `dataclasses.replace(recipe, ...)`.

>>> from looplm_jax.recipes import Scale, named_recipe, scaled
>>> recipe = named_recipe("mano-small")
>>> recipe.total_steps
2000
>>> scaled(recipe, Scale.TINY).total_steps  # the same stages, a few steps each, on two CPU cores
4

By name: `RECIPES` maps the names to functions without arguments, and `named_recipe` returns the recipe of a name or
suggests a similar one. `demo` is the recipe of the demonstration.

Variations: `scaled` returns a recipe at a `Scale`, and `without_loops` the same model with its layers applied once.

Topologies: the stages of a recipe may have other settings for certain devices, such as `v5e:16x16`. `on_topology`
returns a recipe with the settings for given devices, and `known_topologies` lists the devices that it has settings for.
`with_settings` adds settings to a stage, and `settings_in_use` describes those in use.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # By name.
    from looplm_jax.recipes._registry import RECIPES, named_recipe
    from looplm_jax.recipes._small import demo

    # Variations.
    from looplm_jax.recipes._registry import Scale, scaled
    from looplm_jax.recipes._small import without_loops

    # Settings for certain devices.
    from looplm_jax.recipes._topologies import known_topologies, on_topology, settings_in_use, with_settings

__all__ = [
    "RECIPES",
    "Scale",
    "demo",
    "known_topologies",
    "named_recipe",
    "on_topology",
    "scaled",
    "settings_in_use",
    "with_settings",
    "without_loops",
]
