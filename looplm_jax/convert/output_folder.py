"""An output folder that appears complete, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from looplm_jax.errors import UserError
from looplm_jax.files import locked, writing


@contextlib.contextmanager
def fresh_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a staging folder that becomes `out` if the body succeeds, and is removed if it raises.

    The staging folder is next to `out`, on the same file system, so that the final rename is atomic. The partial output
    of an earlier process that was killed is removed first.

    Raises:
      UserError: `out` exists and is not an empty folder, another process is writing it, or the file system refuses a
        write.
    """
    out = Path(out)
    with writing(out):
        target = _absent_or_empty(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.partial")
        with _only_writer(staging, out), _named_as(out, staging):
            try:
                _remove_contents(staging)
                yield staging
                staging.replace(target)
            # BaseException: Ctrl-C must not leave a staging folder either.
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise


def _absent_or_empty(out: Path) -> Path:
    """Returns the path of `out` with links resolved. Raises UserError unless it is absent or an empty folder."""
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} is a file; choose another folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    # Neither can be replaced by a rename.
    if target == Path.cwd() or target.is_mount():
        raise UserError(f"{out} is the current folder or a mount point; name a new folder inside it")
    return target


@contextlib.contextmanager
def _only_writer(staging: Path, out: Path) -> Iterator[None]:
    """Creates the folder and holds its lock. Raises UserError if another process is writing there."""

    def busy() -> None:
        raise UserError(f"{out} is being written by another process; choose another folder") from None

    staging.mkdir(exist_ok=True)
    with locked(staging, busy=busy):
        yield


@contextlib.contextmanager
def _named_as(out: Path, staging: Path) -> Iterator[None]:
    """Replaces the staging folder with `out` in error messages: by then the staging folder no longer exists."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(staging), str(out))) from error


def _remove_contents(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
