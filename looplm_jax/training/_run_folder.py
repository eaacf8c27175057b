"""The folder of a run, and the check that it contains this run."""

import dataclasses
import json
import os

from etils import epath

from looplm_jax.checkpoints import CheckpointStore, read_metadata
from looplm_jax.checkpoints._paths import checkpoint_path
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
    report_failed_reads,
    report_failed_writes,
    write_atomically,
)
from looplm_jax.resume import check_same_run
from looplm_jax.training._ownership import OWNER_FILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run folder: recipe, tokenizer, checkpoints, metrics, TensorBoard events, plots and report."""

    path: AnyPath

    @property
    def checkpoints(self) -> AnyPath:
        """The folder of the steps, as an absolute path, which Orbax requires."""
        return absolute(self.path) / "checkpoints"

    @property
    def config(self) -> AnyPath:
        """The recipe, as JSON."""
        return self.path / "config.json"

    @property
    def metrics(self) -> AnyPath:
        """The metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> AnyPath:
        """The tokenizer, if the run trained one."""
        return self.path / "tokenizer.model"

    @property
    def started(self) -> bool:
        """Whether anything was trained. From then on the folder belongs to its recipe."""
        return self.checkpoints.exists() or (self.metrics.exists() and epath.Path(self.metrics).stat().length > 0)


def check_run_folder(path: str | os.PathLike[str], recipe: Recipe) -> RunFolder:
    """Returns the folder of this run: a new one, or one with an earlier part of the same run. Writes nothing.

    Raises:
      UserError: the folder contains another run or unrelated files, cannot be reached, or has a name under which no
        checkpoint can be stored.
    """
    folder = RunFolder(path=any_path(path))
    # Refuses names that Orbax or TensorStore would misread, before anything is trained.
    checkpoint_path(folder.checkpoints)
    with report_failed_reads(folder.path):
        _check_contents(folder, recipe)
    return folder


def claim_run_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Creates the folder and writes the recipe.

    Files of a command that failed before its first step are replaced.

    Raises:
      UserError: the disk refuses the write.
    """
    with report_failed_writes(folder.path):
        make_folder(folder.path)
        if not folder.started:
            # The earlier attempt may have trained it on other data.
            folder.tokenizer.unlink(missing_ok=True)
    write_atomically(folder.config, (json.dumps(to_dict(recipe), indent=2) + "\n").encode())


def read_recipe(path: AnyPath) -> Recipe:
    """Returns the recipe in a JSON file. Raises UserError if the file does not contain one."""
    check_regular(path)
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}; check the path") from None
    except UserError:
        # A UserError is a ValueError, and has its message already.
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        # Python's parser of JSON is recursive.
        raise UserError(f"{path} is not a recipe: its JSON is nested too deep") from None
    return from_dict(Recipe, values)


def _check_contents(folder: RunFolder, recipe: Recipe) -> None:
    """Raises UserError if the folder contains another run or unrelated files."""
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file; choose another --out")
    if not folder.started:
        # A folder with a recipe, but without metrics and checkpoints, is a run that ended before its first step: any
        # recipe may start there.
        if not folder.config.exists() and _holds_files(folder):
            raise UserError(f"{folder.path} is not empty and holds no run; choose another --out")
        return

    saved = saved_recipe(folder)
    if saved is None:
        raise UserError(
            f"{folder.config} is missing or damaged, and no checkpoint says what was trained here; choose another --out"
        )

    check_same_run(str(folder.path), to_dict(saved), to_dict(recipe))


def saved_recipe(folder: RunFolder) -> Recipe | None:
    """Returns the recipe of a run that has begun, or None.

    If `config.json` is missing or damaged, the recipe is read from the checkpoints.
    """
    check_regular(folder.config)
    try:
        values = json.loads(folder.config.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        values = None
    # Every checkpoint has the recipe, too.
    if not isinstance(values, dict):
        return _checkpoint_recipe(folder)
    return from_dict(Recipe, values)


def _checkpoint_recipe(folder: RunFolder) -> Recipe | None:
    """Returns the recipe of the latest checkpoint with readable metadata, or None if there is no checkpoint."""
    if not CheckpointStore(folder.checkpoints, keep=1).steps():
        return None
    return read_metadata(str(folder.checkpoints)).saved_recipe()


def _holds_files(folder: RunFolder) -> bool:
    """Whether the folder contains files other than those of a process that was killed at its start."""
    unfinished = (f"{folder.config.name}.new", OWNER_FILE)  # left by a process that was killed at its start
    return folder.path.is_dir() and any(entry.name not in unfinished for entry in folder.path.iterdir())
