"""The folder of a prepared corpus, on a disk or in a bucket, in which every file appears whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from looplm_jax.errors import UserError
from looplm_jax.files import (
    AnyPath,
    absolute,
    any_path,
    forget_listing,
    locked,
    make_folder,
    reading,
    write_atomically,
    writing,
)

MANIFEST = "manifest.json"
PLAN = "looplm_plan.json"
SHARD = ".arrayrecord"
SIGNATURES = "signatures"
_BUCKET = "gs://"
UNFINISHED = ".unfinished"


class PreparedFolder:
    """Files by name; a name may have one folder in it.

    Args:
      url: a local path or a gs:// URL, which are what ArrayRecord reads.

    Raises:
      UserError: another kind of URL.
    """

    def __init__(self, url: str):
        if not _is_possible(url):
            raise UserError(f"{url}: a prepared corpus lies in a local folder or at gs://; choose one of them")
        self.path: AnyPath = absolute(any_path(url))

    def at(self, name: str) -> AnyPath:
        """Returns where a file is, as messages and ArrayRecord name it. Raises UserError for one outside the folder."""
        parts = name.split("/")
        if len(parts) > 2 or any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
            raise UserError(f"{self.path} names the file {name!r}, which is not in that folder; copy the folder again")
        return self.path / name

    def read(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError, or UserError where it cannot be read."""
        path, missing = self.at(name), None
        with reading(path):
            try:
                return path.read_bytes()
            except FileNotFoundError as error:
                missing = error
        raise missing

    def names(self, folder: str = "") -> frozenset[str]:
        """The files and folders in the folder, or in one of its own; none where there is no such folder."""
        path = self.path / folder if folder else self.path
        with reading(path):
            forget_listing(path)
            try:
                return frozenset(found.name for found in path.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return frozenset()

    def write(self, name: str, content: bytes) -> None:
        """Write a small file. Raises UserError where the place refuses."""
        with writing(self.at(name)):
            make_folder(self.at(name).parent)
        write_atomically(self.at(name), content)

    def publish(self, file: Path, name: str) -> None:
        """Move a finished file, written in `scratch`, to its place. Raises UserError where the place refuses."""
        place = self.at(name)
        if isinstance(place, Path):
            with writing(place):
                os.replace(file, place)
        else:
            write_atomically(place, file.read_bytes())
            file.unlink()

    def remove_folder(self, name: str) -> None:
        """Remove a folder of this one, where it is there."""
        with writing(self.at(name)), contextlib.suppress(FileNotFoundError):
            if isinstance(self.path, Path):
                shutil.rmtree(self.path / name)
            else:
                self.path.joinpath(name).rmtree()

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[Path]:
        """Make the folder and keep other processes out of it, where it is local. Gives a place for unfinished files.

        What is left there at the end is removed, and so is what a killed process left.

        Raises:
          UserError: the folder is a file, another process writes there now, or the disk refuses.
        """
        if not isinstance(self.path, Path):
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        scratch_here = self.path / UNFINISHED
        with locked(self.path, busy=self._busy):
            shutil.rmtree(scratch_here, ignore_errors=True)
            with writing(self.path):
                scratch_here.mkdir()
            try:
                yield scratch_here
            finally:
                shutil.rmtree(scratch_here, ignore_errors=True)

    def _busy(self) -> None:
        message = f"{self.path} is being written by another process; wait for it, or choose another --out"
        raise UserError(message) from None


def is_prepared(path: str) -> bool:
    """Whether a source's path is the folder of a prepared corpus. Raises UserError where one is not finished."""
    if not _is_possible(path):
        return False
    folder = any_path(path)
    with reading(folder):
        if (folder / MANIFEST).exists():
            return True
        if (folder / PLAN).exists():
            raise UserError(f"{path} is not finished; run the same `looplm tokenize` command again")
    return False


def _is_possible(url: str) -> bool:
    return url.startswith(_BUCKET) or "://" not in url
