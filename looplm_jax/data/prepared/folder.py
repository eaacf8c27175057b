"""The folder of a prepared corpus, local or in a bucket. Every file in it is written atomically."""

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
    report_failed_reads,
    report_failed_writes,
    write_atomically,
)

MANIFEST = "manifest.json"
PLAN = "looplm_plan.json"
SHARD = ".arrayrecord"
SIGNATURES = "signatures"
_BUCKET = "gs://"
UNFINISHED = ".unfinished"


class PreparedFolder:
    """Files by name. A name may contain one subfolder.

    Args:
      url: a local path or a gs:// URL, the kinds that ArrayRecord reads.

    Raises:
      UserError: the URL is of another kind.
    """

    def __init__(self, url: str):
        if not _is_possible(url):
            raise UserError(f"{url}: a prepared corpus lies in a local folder or at gs://; choose one of them")
        self.path: AnyPath = absolute(any_path(url))

    def at(self, name: str) -> AnyPath:
        """Returns the path of a file, as used by messages and by ArrayRecord.

        Raises:
          UserError: the name leads out of the folder or is not printable.
        """
        parts = name.split("/")
        if len(parts) > 2 or any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
            raise UserError(f"{self.path} names the file {name!r}, which is not in that folder; copy the folder again")
        return self.path / name

    def read(self, name: str) -> bytes:
        """Returns the content of a file.

        Raises:
          FileNotFoundError: there is no such file.
          UserError: the file cannot be read.
        """
        # Raised outside of `reading`, which converts every OSError to a UserError.
        path, missing = self.at(name), None
        with report_failed_reads(path):
            try:
                return path.read_bytes()
            except FileNotFoundError as error:
                missing = error
        raise missing

    def names(self, folder: str = "") -> frozenset[str]:
        """Returns the names in the folder, or in a subfolder. The result is empty if there is no such folder."""
        path = self.path / folder if folder else self.path
        with report_failed_reads(path):
            # Clients of buckets cache listings, and other processes write to the folder as well.
            forget_listing(path)
            try:
                return frozenset(found.name for found in path.iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return frozenset()

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file atomically. Raises UserError if the file system refuses."""
        with report_failed_writes(self.at(name)):
            make_folder(self.at(name).parent)
        write_atomically(self.at(name), content)

    def publish(self, file: Path, name: str) -> None:
        """Moves a finished file from the scratch folder to its final name.

        Raises UserError if the file system refuses.
        """
        place = self.at(name)
        if isinstance(place, Path):
            with report_failed_writes(place):
                os.replace(file, place)
        else:
            write_atomically(place, file.read_bytes())
            file.unlink()

    def remove_folder(self, name: str) -> None:
        """Removes a subfolder if it exists."""
        with report_failed_writes(self.at(name)), contextlib.suppress(FileNotFoundError):
            if isinstance(self.path, Path):
                shutil.rmtree(self.path / name)
            else:
                self.path.joinpath(name).rmtree()

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[Path]:
        """Creates the folder and yields a scratch folder for unfinished files, which is removed at the end.

        A local folder is locked against other processes, and unfinished files of a killed process are removed. In a
        bucket there are no locks, and the scratch folder is local.

        Raises:
          UserError: the folder is a file, another process is writing to it, or the file system refuses.
        """
        if not isinstance(self.path, Path):
            with tempfile.TemporaryDirectory() as scratch:
                yield Path(scratch)
            return

        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; choose another --out")

        with report_failed_writes(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

        # The scratch folder is inside the corpus folder, so that `publish` renames within one file system.
        scratch_here = self.path / UNFINISHED
        with locked(self.path, busy=self._busy):
            shutil.rmtree(scratch_here, ignore_errors=True)
            with report_failed_writes(self.path):
                scratch_here.mkdir()

            try:
                yield scratch_here
            finally:
                shutil.rmtree(scratch_here, ignore_errors=True)

    def _busy(self) -> None:
        """Raises UserError because another process holds the lock."""
        message = f"{self.path} is being written by another process; wait for it, or choose another --out"
        raise UserError(message) from None


# Prepared corpora as sources


def is_prepared(path: str) -> bool:
    """Whether the path of a source is a prepared corpus. Raises UserError if its preparation is not finished."""
    if not _is_possible(path):
        return False
    folder = any_path(path)
    with report_failed_reads(folder):
        if (folder / MANIFEST).exists():
            return True
        if (folder / PLAN).exists():
            raise UserError(f"{path} is not finished; run the same `looplm tokenize` command again")
    return False


def _is_possible(url: str) -> bool:
    """Whether a URL is local or in Cloud Storage."""
    return url.startswith(_BUCKET) or "://" not in url
