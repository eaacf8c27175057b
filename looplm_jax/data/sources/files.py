"""Files by path, glob, folder or fsspec URL."""

import contextlib
import dataclasses
import posixpath
from collections.abc import Iterator
from typing import IO, Any

import fsspec

from looplm_jax.errors import UserError

KNOWN_SUFFIXES = (".jsonl", ".md", ".parquet", ".py", ".rst", ".txt")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that can be read in part."""

    fs: Any  # fsspec.AbstractFileSystem
    path: str

    @property
    def name(self) -> str:
        """The file as messages name it: a local path, or a URL."""
        return self.path if "file" in _protocols(self.fs) else self.fs.unstrip_protocol(self.path)

    @property
    def suffix(self) -> str:
        """The ending of the name in small letters, with its dot."""
        return posixpath.splitext(self.path)[1].lower()

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start..end`; safe from many threads. Raises UserError when the file cannot be read."""
        with _readable(self.name):
            return self.fs.cat_file(self.path, start=start, end=end)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The file as a stream. Raises UserError when it cannot be read."""
        with _readable(self.name), self.fs.open(self.path, "rb") as stream:
            yield stream


def find_files(pattern: str) -> tuple[DataFile, ...]:
    """The files of a path, a glob or a folder (all files of known kinds below it), in sorted order.

    Raises:
      UserError: nothing matches, or the place cannot be reached.
    """
    with _readable(pattern):
        fs, path = _file_system(pattern)
        paths = _matches(fs, path)
    if not paths:
        raise UserError(f"no file matches {pattern!r}; check the path, and quote a glob: --data 'folder/*.jsonl'")
    return tuple(DataFile(fs, match) for match in sorted(paths))


def read_file(path: str) -> bytes:
    """A whole file at a path or URL. Raises UserError when it cannot be read."""
    with _readable(path):
        fs, inner = _file_system(path)
        return fs.cat_file(inner)


def _file_system(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}; install what it names, or use a local path") from None


def _matches(fs: Any, path: str) -> list[str]:
    if fs.isdir(path):
        return [found for found in fs.find(path) if found.lower().endswith(KNOWN_SUFFIXES)]
    if fs.exists(path):
        return [path]
    return [found for found in fs.glob(path) if fs.isfile(found)]


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file; check the path") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{name}: cannot be read ({reason}); check its permissions and its kind") from None
