"""The folder of a run, and who may write to it."""

import dataclasses
import json
import os

from etils import epath

from looplm_jax.checkpoints import CheckpointStore, check_same_run, read_metadata
from looplm_jax.checkpoints.paths import checkpoint_path
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError
from looplm_jax.files import (
    AnyPath,
    absolute,
    any_path,
    check_regular,
    make_folder,
    read_text,
    reading,
    write_atomically,
    writing,
)
from looplm_jax.training.ownership import OWNER_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """One run: recipe, tokeniser, checkpoints, metrics, TensorBoard events, plots and report."""

    path: AnyPath

    @property
    def checkpoints(self) -> AnyPath:
        """Where the steps are saved; Orbax wants the whole path."""
        return absolute(self.path) / "checkpoints"

    @property
    def config(self) -> AnyPath:
        """The recipe, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> AnyPath:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> AnyPath:
        """The tokeniser, where the run trained one."""
        return self.path / "tokenizer.model"

    @property
    def begun(self) -> bool:
        """Whether anything was trained: from then on the folder belongs to its recipe."""
        return self.checkpoints.exists() or (self.metrics.exists() and epath.Path(self.metrics).stat().length > 0)


def check_folder(path: str | os.PathLike[str], recipe: Recipe) -> RunFolder:
    """The folder of this run: a new one, or the one that an earlier process of the same run left. Nothing is written.

    Raises:
      UserError: the folder holds another run, or files that are no run, or cannot be reached, or no checkpoint can be
        kept under its name.
    """
    folder = RunFolder(path=any_path(path))
    checkpoint_path(folder.checkpoints)
    with reading(folder.path):
        _check_folder(folder, recipe)
    return folder


def claim_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Make the folder and write the recipe. What a command that failed before its first step left there gives way.

    Raises:
      UserError: the disk refuses.
    """
    with writing(folder.path):
        make_folder(folder.path)
        if not folder.begun:
            folder.tokenizer.unlink(missing_ok=True)
    write_atomically(folder.config, (json.dumps(to_dict(recipe), indent=2) + "\n").encode())


def read_recipe(path: AnyPath) -> Recipe:
    """A recipe from a JSON file. Raises UserError where it is not one."""
    check_regular(path)
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path} is not a recipe: its JSON is nested too deep") from None
    return from_dict(Recipe, values)


def _check_folder(folder: RunFolder, recipe: Recipe) -> None:
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file; choose another --out")
    if not folder.begun:
        if not folder.config.exists() and _holds_files(folder):
            raise UserError(f"{folder.path} is not empty and holds no run; choose another --out")
        return
    saved = _saved_recipe(folder)
    if saved is None:
        raise UserError(
            f"{folder.config} is missing or damaged, and no checkpoint says what was trained here; choose another --out"
        )
    check_same_run(str(folder.path), to_dict(saved), to_dict(recipe))


def _saved_recipe(folder: RunFolder) -> Recipe | None:
    """Returns the recipe of a run that has begun: from its checkpoints where `config.json` is missing or damaged."""
    check_regular(folder.config)
    try:
        values = json.loads(folder.config.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        return _checkpoint_recipe(folder)
    return from_dict(Recipe, values)


def _checkpoint_recipe(folder: RunFolder) -> Recipe | None:
    """Returns the recipe in the latest checkpoint whose description can be read; None where there is none."""
    if not CheckpointStore(folder.checkpoints, keep=1).steps():
        return None
    return read_metadata(str(folder.checkpoints)).saved_recipe()


def _holds_files(folder: RunFolder) -> bool:
    unfinished = (f"{folder.config.name}.new", OWNER_FILE)  # of a process that was killed in its first moments
    return folder.path.is_dir() and any(entry.name not in unfinished for entry in folder.path.iterdir())
