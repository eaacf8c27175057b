"""Train a looped language model through the stages of a recipe.

    looplm train --recipe text-small --data 'mine/*.jsonl'

Any field of the recipe is a flag: `--model.width 128`, `--stages.pretrain.steps 500`, `--stage.beta 0.1` (of every
stage). The same command again goes on where it stopped.
"""

import argparse
import dataclasses
from pathlib import Path

from looplm_jax import codec
from looplm_jax.config import DataConfig, OnBadRecord, Recipe, SourceConfig
from looplm_jax.errors import UserError, suggest
from looplm_jax.recipes import RECIPES, Scale, named_recipe, scaled

OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `looplm train`; the fields of a recipe are listed below them."""
    names = ", ".join(RECIPES)
    parser.add_argument("--recipe", default="text-small", help=f"{names}, or a .json file (default: text-small)")
    parser.add_argument("--out", help="run folder (default: runs/<recipe>); one that holds this run is continued")
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="files to train on: a glob, a folder or an fsspec URL of .txt, .jsonl, .parquet; or a task such as "
        "mano:length=4,modulus=7; may be repeated",
    )
    parser.add_argument(
        "--tokenizer", help="a SentencePiece .model or a tokenizer.json; default: train one on the data"
    )
    parser.add_argument(
        "--on-bad-record",
        choices=[choice.value for choice in OnBadRecord],
        help="what a record that cannot be read does (default: stop)",
    )
    parser.add_argument(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.FULL.value,
        help="tiny: every stage of the recipe in a few steps, at a thousandth of the size (default: full)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the recipe as JSON and stop")
    parser.epilog = "fields of the recipe (with the values of text-small):\n" + _field_list()


def run(arguments: argparse.Namespace) -> int:
    """Train, report, and say what to type next."""
    recipe = _recipe(arguments)
    if arguments.dry_run:
        import json

        print(json.dumps(codec.to_dict(recipe), indent=2))
        return 0
    if not all(recipe.data_of(stage).sources for stage in recipe.stages):
        raise UserError("there is nothing to train on; say --data 'mine/*.jsonl' (.txt, .jsonl, .parquet, or a folder)")
    from looplm_jax.cli.training_session import run_training

    return run_training(recipe, Path(arguments.out or f"runs/{recipe.name}"))


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if arguments.recipe.endswith(".json"):
        from looplm_jax.training.run_folder import read_recipe

        recipe = read_recipe(Path(arguments.recipe))
    else:
        recipe = named_recipe(arguments.recipe)
    recipe = scaled(recipe, Scale(arguments.scale))
    recipe = dataclasses.replace(recipe, data=_data(recipe.data, arguments))
    if arguments.data:
        recipe = dataclasses.replace(
            recipe, stages=tuple(dataclasses.replace(stage, sources=()) for stage in recipe.stages)
        )
    changes = codec.parse_flags(arguments.overrides)
    _refuse_unknown(recipe, changes, arguments.flags)
    return codec.override(recipe, changes)


def _data(data: DataConfig, arguments: argparse.Namespace) -> DataConfig:
    changes: dict[str, object] = {}
    if arguments.data:
        changes["sources"] = tuple(SourceConfig(path=path) for path in arguments.data)
    if arguments.tokenizer:
        changes["tokenizer"] = arguments.tokenizer
    if arguments.on_bad_record:
        changes["on_bad_record"] = OnBadRecord(arguments.on_bad_record)
    return dataclasses.replace(data, **changes)  # type: ignore[arg-type]


def _refuse_unknown(recipe: Recipe, changes: dict[str, str], flags: list[str]) -> None:
    """A flag without a dot is a misspelt flag of the command, or a field at the top of the recipe."""
    top = [leaf.path for leaf in codec.leaves(recipe) if "." not in leaf.path]
    for name in changes:
        if "." not in name and name not in top:
            known = [*flags, *(f"--{path}" for path in top)]
            hint = suggest(f"--{name}", known, otherwise="; `looplm train --help` lists them")
            raise UserError(f"unknown flag '--{name}'{hint}")


def _field_list() -> str:
    leaves = list(codec.leaves(named_recipe("text-small")))
    width = max(len(leaf.path) for leaf in leaves)
    return "\n".join(f"  --{leaf.path:{width}}  {leaf.help} ({_shown(leaf.value)})" for leaf in leaves)


def _shown(value: object) -> str:
    value = getattr(value, "value", value)
    return "empty" if value in ("", ()) else str(value)
