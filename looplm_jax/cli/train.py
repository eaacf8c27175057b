"""Train a looped language model through the stages of a recipe.

    looplm train --recipe text-small --data 'mine/*.jsonl'

Any field of the recipe is a flag: `--model.width 128`, `--stages.pretrain.steps 500`, `--stage.beta 0.1` (of every
stage). The same command resumes a run that stopped.

On many hosts, run the same command on each: with --distributed on a TPU pod or under Slurm, elsewhere with
--coordinator, --processes and --process. Without these flags a run is one process.
"""

import argparse
import dataclasses

from looplm_jax import codec
from looplm_jax.cli.chosen_recipe import chosen_recipe, with_overrides
from looplm_jax.config import DataConfig, OnBadRecord, Recipe, RecordKind, SourceConfig, sources_like
from looplm_jax.errors import UserError
from looplm_jax.files import any_path
from looplm_jax.recipes import RECIPES, Scale, named_recipe

OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm train`; the fields of a recipe are listed below them."""
    names = ", ".join(RECIPES)

    parser.add_argument("--recipe", default="text-small", help=f"{names}, or a .json file (default: text-small)")
    parser.add_argument(
        "--out", help="run folder, or gs://bucket/folder (default: runs/<recipe>); one that holds this run is continued"
    )
    parser.add_argument(
        "--data",
        action="append",
        metavar="PATH",
        help="files to train on: a glob, a folder or an fsspec URL of .txt, .jsonl(.gz, .zst), .parquet, .arrayrecord; "
        "huggingface:dataset,split=train; or a task such as mano:length=4,modulus=7; may be repeated",
    )
    parser.add_argument("--chat", action="store_true", help="the records of --data are chats, not texts")
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

    parser.add_argument(
        "--profile-steps", metavar="FIRST:LAST", help="trace these steps into the run folder, for the profiler's viewer"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="show the metrics in a project of Weights & Biases too")

    parser.add_argument(
        "--distributed", action="store_true", help="find the other processes of a TPU pod or of a Slurm job"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    parser.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    parser.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")

    parser.add_argument("--dry-run", action="store_true", help="print the recipe as JSON and stop")
    parser.epilog = "fields of the recipe (with the values of text-small):\n" + _field_list()


def run(arguments: argparse.Namespace) -> int:
    """Trains, writes the report, and prints which command to run next. Returns the exit status."""
    recipe = _recipe(arguments)
    if arguments.dry_run:
        import json

        print(json.dumps(codec.to_dict(recipe), indent=2))
        return 0

    # Stages without their own sources use those of the recipe.
    if not all(recipe.data_of(stage).sources for stage in recipe.stages):
        raise UserError("there is nothing to train on; say --data 'mine/*.jsonl' (.txt, .jsonl, .parquet, or a folder)")

    from looplm_jax.cli.training_session import Options, run_training
    from looplm_jax.distributed import JoinOptions
    from looplm_jax.training._profiling import ProfiledSteps

    join_options = JoinOptions(
        automatic=arguments.distributed,
        coordinator=arguments.coordinator,
        processes=arguments.processes,
        process=arguments.process,
    )

    profile = ProfiledSteps.parse(arguments.profile_steps) if arguments.profile_steps else None
    options = Options(
        given=frozenset(codec.parse_flags(arguments.overrides)),
        join_options=join_options,
        profile=profile,
        wandb_project=arguments.wandb,
    )
    return run_training(recipe, any_path(arguments.out or _default_folder(recipe)), options)


# The run folder and the recipe


def _default_folder(recipe: Recipe) -> str:
    """Returns the default run folder. Raises UserError if the recipe's name would lead out of `runs`."""
    if recipe.name in ("", ".", "..") or "/" in recipe.name or "\0" in recipe.name:
        raise UserError(f"the recipe's name {recipe.name!r} is not that of a folder; say --out, or set another --name")
    return f"runs/{recipe.name}"


def _recipe(arguments: argparse.Namespace) -> Recipe:
    """Returns the recipe with the changes of the arguments."""
    recipe = chosen_recipe(arguments.recipe, arguments.scale)
    recipe = dataclasses.replace(recipe, data=_data(recipe, arguments))
    if arguments.data:
        # `--data` replaces the sources of all stages.
        recipe = dataclasses.replace(
            recipe, stages=tuple(dataclasses.replace(stage, sources=()) for stage in recipe.stages)
        )
    return with_overrides(recipe, arguments.overrides, arguments.flags, "train")


def _data(recipe: Recipe, arguments: argparse.Namespace) -> DataConfig:
    """Returns the data configuration with the changes of the arguments."""
    changes: dict[str, object] = {}
    if arguments.data:
        # Files of --data are read like the recipe's own sources, if these agree on kind and keys.
        known = (source for stage in recipe.stages for source in recipe.data_of(stage).sources)
        sources = sources_like(arguments.data, known)
        changes["sources"] = tuple(map(_as_chats, sources)) if arguments.chat else sources
    if arguments.tokenizer:
        changes["tokenizer"] = arguments.tokenizer
    if arguments.on_bad_record:
        changes["on_bad_record"] = OnBadRecord(arguments.on_bad_record)
    return dataclasses.replace(recipe.data, **changes)  # type: ignore[arg-type]


def _as_chats(source: SourceConfig) -> SourceConfig:
    """Returns the source with records that are chats."""
    return dataclasses.replace(source, kind=RecordKind.CHAT)


# The list of fields in --help


def _field_list() -> str:
    """Returns the list of recipe fields with their help texts."""
    leaves = list(codec.leaves(named_recipe("text-small")))
    width = max(len(leaf.path) for leaf in leaves)
    return "\n".join(f"  --{leaf.path:{width}}  {leaf.help} ({_shown(leaf.value)})" for leaf in leaves)


def _shown(value: object) -> str:
    """Returns a default value as text."""
    value = getattr(value, "value", value)
    return "empty" if value in ("", ()) else str(value)
