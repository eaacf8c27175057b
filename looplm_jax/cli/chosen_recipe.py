"""The recipe of a command: selected by name or file, scaled, with the fields that flags override."""

from pathlib import Path

from looplm_jax import codec
from looplm_jax.cli.home import expand_home_everywhere
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError, suggest
from looplm_jax.recipes import RECIPES, Scale, named_recipe, scaled


def chosen_recipe(name: str, scale: str) -> Recipe:
    """Returns the recipe with a name, or from a .json file. Raises UserError if there is none."""
    if name.endswith(".json"):
        # Imported here, because it loads JAX, which `--help` does not need.
        from looplm_jax.training._run_folder import read_recipe

        return scaled(read_recipe(Path(name)), Scale(scale))
    return scaled(named_recipe(name), Scale(scale))


def recipe_or_checkpoint(name: str, scale: str) -> Recipe:
    """Returns a recipe, or the recipe of a checkpoint or Hugging Face folder without reading its arrays.

    Raises UserError if there is none.
    """
    if name in RECIPES or name.endswith(".json"):
        return chosen_recipe(name, scale)
    # A path in a bucket is checked when it is read.
    if "://" not in name and not Path(name).exists():
        hint = suggest(name, RECIPES, otherwise="; name a recipe, a .json file or a checkpoint")
        raise UserError(f"there is no recipe and no checkpoint {name!r}{hint}")
    return scaled(_recipe_of(name), Scale(scale))


def _recipe_of(checkpoint: str) -> Recipe:
    """Returns the recipe of a checkpoint, or one for a Hugging Face folder."""
    from looplm_jax.checkpoints import read_metadata
    from looplm_jax.convert._import_hf import converted_recipe, is_hf_folder, read_hf_config

    folder = Path(checkpoint)
    return (
        converted_recipe(folder, read_hf_config(folder)) if is_hf_folder(folder) else read_metadata(checkpoint).recipe()
    )


def with_overrides(recipe: Recipe, overrides: list[str], flags: list[str], command: str) -> Recipe:
    """Returns the recipe with the fields of flags such as `--model.width 128`, and with `~/` expanded in its paths.

    Raises:
      UserError: a field is unknown, or its value is invalid.
    """
    changes = codec.parse_flags(overrides)
    _refuse_unknown(recipe, changes, flags, command)
    return codec.from_dict(Recipe, expand_home_everywhere(codec.to_dict(codec.override(recipe, changes))))


def _refuse_unknown(recipe: Recipe, changes: dict[str, str], flags: list[str], command: str) -> None:
    """Raises UserError for a flag that is neither a field at the top of the recipe nor a path to a nested field.

    The hint also covers misspelled flags of the command itself, which argparse leaves among the overrides.
    """
    top = [leaf.path for leaf in codec.leaves(recipe) if "." not in leaf.path]
    for name in changes:
        if "." not in name and name not in top:
            known = [*flags, *(f"--{path}" for path in top)]
            hint = suggest(f"--{name}", known, otherwise=f"; `looplm {command} --help` lists them")
            raise UserError(f"unknown flag '--{name}'{hint}")
