"""Recipes by name: whole runs that `looplm train --recipe NAME` starts."""

from collections.abc import Callable

from looplm_jax.config import Recipe
from looplm_jax.errors import UserError, suggest
from looplm_jax.recipes.ouro import ouro_1_4b, ouro_1_4b_thinking, ouro_2_6b, ouro_2_6b_thinking
from looplm_jax.recipes.scale import Scale, scaled
from looplm_jax.recipes.small import demo, demo_one_loop, mano_small, text_small, without_loops

__all__ = ["RECIPES", "Scale", "demo", "named_recipe", "scaled", "without_loops"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    "text-small": text_small,
    "demo": demo,
    "demo-one-loop": demo_one_loop,
    "mano-small": mano_small,
    "ouro-1.4b": ouro_1_4b,
    "ouro-2.6b": ouro_2_6b,
    "ouro-1.4b-thinking": ouro_1_4b_thinking,
    "ouro-2.6b-thinking": ouro_2_6b_thinking,
}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UserError with the list if there is none."""
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}{suggest(name, RECIPES)}, or give the path of a .json file")
    return RECIPES[name]()
