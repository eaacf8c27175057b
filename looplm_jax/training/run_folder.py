"""The folder of a run, and who may write to it."""

import dataclasses
import json
import os
from pathlib import Path

from looplm_jax.checkpoints import check_same_run
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunFolder:
    """`config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `tokenizer.*`, plots and `report.md` of
    one run.
    """

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where the steps are saved."""
        return self.path / "checkpoints"

    @property
    def config(self) -> Path:
        """The recipe, as JSON."""
        return self.path / "config.json"


def open_run(path: str | os.PathLike[str], recipe: Recipe) -> RunFolder:
    """The folder of this run: a new one, or the one that an earlier process of the same run left.

    Raises:
      UserError: the folder holds another run, or files that are no run. Nothing is overwritten.
    """
    folder = RunFolder(path=Path(path))
    if folder.config.exists():
        check_same_run(str(folder.path), to_dict(read_recipe(folder.config)), to_dict(recipe))
    elif folder.path.is_dir() and any(folder.path.iterdir()):
        raise UserError(f"{folder.path} is not empty and holds no run; choose another --out")
    elif folder.path.exists() and not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file; choose another --out")
    folder.path.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.config, (json.dumps(to_dict(recipe), indent=2) + "\n").encode())
    return folder


def read_recipe(path: Path) -> Recipe:
    """A recipe from a JSON file. Raises UserError where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return from_dict(Recipe, values)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_bytes(content)
    os.replace(temporary, path)
