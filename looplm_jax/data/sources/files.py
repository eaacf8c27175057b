"""Files by path, glob, folder or fsspec URL."""

import contextlib
import dataclasses
import io
import os
import posixpath
import re
from collections.abc import Iterator
from typing import IO, Any

import fsspec

from looplm_jax.data.sources.compression import Compression, decompressed
from looplm_jax.errors import UserError

# What counts in a folder. A `.json` beside the data is more often a description than data; name it to read it.
KNOWN_SUFFIXES = (".array_record", ".arrayrecord", ".jsonl", ".md", ".ndjson", ".parquet", ".py", ".rst", ".txt")
_COMPRESSED_SUFFIXES = (".json", ".jsonl", ".md", ".ndjson", ".py", ".rst", ".txt")
_BUFFER_BYTES = 2**20
_SHARD = re.compile(r"-\d+-of-\d+$")  # the number of a shard may stand after the ending


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that can be read in part, and from its beginning where it is compressed."""

    fs: Any  # fsspec.AbstractFileSystem
    path: str

    @property
    def name(self) -> str:
        """The file as messages name it: a local path, or a URL."""
        return self.path if self.is_local else self.fs.unstrip_protocol(self.path)

    @property
    def is_local(self) -> bool:
        """Whether `path` is one of this machine."""
        return "file" in _protocols(self.fs)

    @property
    def compression(self) -> Compression | None:
        """What the content is compressed with, by the last ending of the name."""
        return Compression.by_suffix(_suffix(self.path))

    @property
    def suffix(self) -> str:
        """The ending of the name in small letters, with its dot; of a compressed file, the one before the last."""
        return _suffix(self.path if self.compression is None else posixpath.splitext(self.path)[0])

    @property
    def in_parts(self) -> bool:
        """Whether part of it can be had without the rest; not every HTTP server gives that."""
        if "http" not in _protocols(self.fs):
            return True
        try:
            with readable(self.name), self.fs.open(self.path, "rb", cache_type="none") as stream:
                stream.seek(1)
                stream.read(1)
            return True
        except UserError:
            raise
        except ValueError:  # fsspec: not a seekable file, or the server sent the whole file
            return False

    @property
    def size(self) -> int:
        """Bytes of the file as it lies there."""
        with readable(self.name):
            return self.fs.size(self.path)

    @property
    def version(self) -> tuple[int, int]:
        """Another one when a local file was written anew; asking far away would take as long as reading."""
        if not self.is_local:
            return (0, 0)
        with readable(self.name):
            found = os.stat(self.path)
        return found.st_mtime_ns, found.st_size

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start..end` as they lie there; safe from many threads. Raises UserError when they cannot be read."""
        with readable(self.name):
            return self.fs.cat_file(self.path, start=start, end=end)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The content as a stream, decompressed. Raises UserError when it cannot be read."""
        with readable(self.name), self.fs.open(self.path, "rb") as stream:
            if self.compression is not None:
                with decompressed(stream, self.compression, self.name) as content:
                    yield content
            else:  # fsspec's own files read a whole block for every line
                yield stream if self.is_local else io.BufferedReader(stream, _BUFFER_BYTES)


def find_files(pattern: str) -> tuple[DataFile, ...]:
    """The files of a path, a glob or a folder (all files of known kinds below it), in sorted order.

    Raises:
      UserError: nothing matches, or the place cannot be reached.
    """
    with readable(pattern):
        fs, path = file_system(pattern)
        paths = _matches(fs, path)
    if not paths:
        raise UserError(f"no file matches {pattern!r}; check the path, and quote a glob: --data 'folder/*.jsonl'")
    return tuple(DataFile(fs, match) for match in sorted(paths))


def read_file(path: str) -> bytes:
    """A whole file at a path or URL. Raises UserError when it cannot be read."""
    with readable(path):
        fs, inner = file_system(path)
        return fs.cat_file(inner)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path within it. Raises UserError for one that is not installed."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}; install what it names, or use a local path") from None


def _matches(fs: Any, path: str) -> list[str]:
    if fs.isfile(path) and not path.endswith("/"):  # first, as HTTP would fetch it whole to see whether it is a folder
        return [path]
    if fs.isdir(path):
        return [found for found in fs.find(path) if _is_known(found)]
    return [found for found in fs.glob(path) if fs.isfile(found)]


def _is_known(path: str) -> bool:
    if Compression.by_suffix(_suffix(path)) is None:
        return _suffix(path) in KNOWN_SUFFIXES
    return _suffix(posixpath.splitext(path)[0]) in _COMPRESSED_SUFFIXES


def _suffix(path: str) -> str:
    return posixpath.splitext(_SHARD.sub("", path))[1].lower()


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Raises UserError, with the name of what is read, where the place refuses."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file; check the path") from None
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be read ({reason}); check its permissions and its kind") from None
