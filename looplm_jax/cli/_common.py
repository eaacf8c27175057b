"""Helpers of several commands that need no JAX: paths, recipes, options from flags, and signals."""

import argparse
import contextlib
import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from looplm_jax import codec
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError, suggest
from looplm_jax.recipes import RECIPES, Scale, named_recipe, scaled

T = TypeVar("T")

# Arguments that name a file or a folder.
_PATHS = (
    *("checkpoint", "data", "decontaminate", "folder", "include_path", "json", "out", "prompt_file", "recipe", "root"),
    *("buckets", "sources", "tokenizer", "write"),
)


def from_flags(options: type[T], arguments: argparse.Namespace) -> T:
    """Returns a dataclass of options, each field from the flag of the same name."""
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    return options(**{name: getattr(arguments, name) for name in names})


# Paths that start with `~`
#
# Shells do not expand them in quotes or in `--out=~/runs`, and recipes are not read by a shell.


def expand_paths(arguments: argparse.Namespace) -> None:
    """Expands every argument that names a file or a folder."""
    for name in _PATHS:
        if hasattr(arguments, name):
            setattr(arguments, name, expand_home(getattr(arguments, name)))


def expand_home(value: Any) -> Any:
    """Returns a path, or a list of paths, with a leading `~/` or `~user/` expanded; other values unchanged."""
    if isinstance(value, list):
        return [expand_home(each) for each in value]
    # argparse has already converted some arguments to Path.
    if isinstance(value, Path):
        return Path(expand_home(str(value)))
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def expand_home_everywhere(tree: Any) -> Any:
    """Returns nested dictionaries and lists with every string that starts with `~/` expanded. Only paths start so."""
    if isinstance(tree, dict):
        return {key: expand_home_everywhere(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [expand_home_everywhere(value) for value in tree]
    return os.path.expanduser(tree) if isinstance(tree, str) and tree.startswith("~/") else tree


# Recipes


def chosen_recipe(name: str, scale: str) -> Recipe:
    """Returns the recipe with a name, or from a .json file. Raises UserError if there is none."""
    if name.endswith(".json"):
        # Imported here, because it loads JAX, which `--help` does not need.
        from looplm_jax.training._run_folder import read_recipe

        path = Path(name)
        if not path.exists():
            # A name of a recipe with the suffix of a file is as likely as a misspelled file.
            known = [*RECIPES, *map(str, path.parent.glob("*.json"))]
            hint = suggest(name, known, otherwise=f"; name a file, or one of {', '.join(RECIPES)}")
            raise UserError(f"there is no recipe {name}{hint}")
        return scaled(read_recipe(path), Scale(scale))
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


# Signals


def exit_process(console: Console, message: str, number: signal.Signals) -> NoReturn:
    """Ends the process without waiting for a compilation in another thread, which would crash a normal exit."""
    with contextlib.suppress(OSError):  # after SIGHUP the terminal may be gone
        console.print(f"looplm: {message}")
        sys.stdout.flush()
        sys.stderr.flush()
    # 128 + n is the exit status that shells give to a process killed by signal n.
    os._exit(128 + number)


@contextlib.contextmanager
def interrupt_calls(end: Callable[[], None]) -> Iterator[None]:
    """Within the block, the first Ctrl-C calls `end` instead of raising; a second one raises as usual.

    Python delivers signals only to the main thread; in other threads the block changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Read before the handler is installed, which a Ctrl-C may call at once.
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        # Restored first, so that a second Ctrl-C works while `end` runs.
        signal.signal(number, before)
        end()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
