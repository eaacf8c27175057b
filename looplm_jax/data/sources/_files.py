"""Data files, local or at an fsspec URL."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterator
from typing import IO, Any

import fsspec

from looplm_jax.config import ReadLimits
from looplm_jax.data.sources._compression import Compression, decompressed
from looplm_jax.errors import UserError
from looplm_jax.files import check_regular

_BUFFER_BYTES = 2**20
# Far more than any tokenizer or recipe; a larger file was named by mistake.
_LARGEST_SMALL_FILE = 2**28
# Fields of fsspec's file systems that identify a version of a file. The first that is present is used, so another order
# would change the digests of prepared corpora.
_VERSIONS = (
    *("md5Hash", "ETag", "etag", "generation", "LastModified", "mtime"),
    *("Content-MD5", "Digest", "Last-Modified"),  # HTTP
    *("blob_id", "last_modified", "modificationTime"),  # Hugging Face Hub, Azure, WebHDFS
)
_SHARD = re.compile(r"-\d+-of-\d+$")  # a shard number after the suffix
_QUERY = re.compile(r"\?[^/]*$")  # a URL query, which downloaded files often keep in their names


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A file that supports random access, or sequential access if it is compressed."""

    fs: Any  # fsspec.AbstractFileSystem
    path: str
    limits: ReadLimits = dataclasses.field(default_factory=ReadLimits)
    content_suffix: str = ""  # the suffix for the content, if the name does not show it

    @property
    def name(self) -> str:
        """The file as used in messages: a local path or a URL."""
        return self.path if self.is_local else self.fs.unstrip_protocol(self.path)

    @property
    def is_local(self) -> bool:
        """Whether the file is on this machine."""
        return "file" in _protocols(self.fs)

    @property
    def compression(self) -> Compression | None:
        """The compression of the content, by the last suffix of the name."""
        return Compression.by_suffix(suffix(self.path))

    @property
    def suffix(self) -> str:
        """The lower-case suffix that determines the format, with its dot.

        For compressed files, the one before the last.
        """
        return self.content_suffix or self.suffix_of_name

    @property
    def suffix_of_name(self) -> str:
        """Like `suffix`, but by the name alone."""
        return suffix(self.path if self.compression is None else posixpath.splitext(_plain(self.path))[0])

    @property
    def in_parts(self) -> bool:
        """Whether a part of the file can be read without the rest. Not every HTTP server supports that."""
        if "http" not in _protocols(self.fs):
            return True

        try:
            with readable(self.name), self.fs.open(self.path, "rb", cache_type="none") as stream:
                # A server that ignores the requested range would send the file from its start.
                stream.seek(1)
                stream.read(1)
            return True
        except UserError:
            raise
        except ValueError:  # fsspec: not a seekable file, or the server sent the whole file
            return False

    @property
    def size(self) -> int:
        """The size of the file in bytes, compressed if it is."""
        with readable(self.name):
            return self.fs.size(self.path)

    @property
    def version(self) -> tuple[int, int]:
        """A value that changes when a local file is rewritten.

        Constant for remote files, where asking is as slow as reading.
        """
        if not self.is_local:
            return (0, 0)
        with readable(self.name):
            found = os.stat(self.path)
        return found.st_mtime_ns, found.st_size

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Returns bytes `start..end` of the file, not decompressed.

        Thread-safe. Raises UserError if they cannot be read.
        """
        with readable(self.name):
            return self.fs.cat_file(self.path, start=start, end=end)

    def digest(self) -> str:
        """Returns a digest of a local file's bytes, or of the version that the store reports for a remote file.

        Reads the whole file from a store that reports no versions.
        """
        if not self.is_local:
            with readable(self.name):
                info = self.fs.info(self.path)
            if version := next((f"{key}={info[key]}" for key in _VERSIONS if info.get(key)), ""):
                return hashlib.blake2b(version.encode(), digest_size=16).hexdigest()

        digest = hashlib.blake2b(digest_size=16)
        with readable(self.name), self.fs.open(self.path, "rb") as stream:
            # Not hashlib.file_digest, which needs more of a stream than every store's file has.
            while block := stream.read(_BUFFER_BYTES):
                digest.update(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Yields the decompressed content as a stream. Raises UserError if it cannot be read."""
        with readable(self.name), self.fs.open(self.path, "rb") as stream:
            if self.compression is not None:
                source = stream if self.is_local else io.BufferedReader(stream, _BUFFER_BYTES)
                size = self.fs.size(self.path)
                with decompressed(source, self.compression, self.name, size, self.limits) as content:
                    yield content
            else:  # fsspec's own files read a whole block for every line
                yield stream if self.is_local else io.BufferedReader(stream, _BUFFER_BYTES)


# Paths and file systems


def read_file(path: str) -> bytes:
    """Returns the content of a small file at a path or URL.

    Raises:
      UserError: the file is not a regular file, is larger than 256 MiB, or cannot be read.
    """
    with readable(path):
        fs, inner = file_system(path)
        if "file" in _protocols(fs):
            check_regular(inner)

        size = fs.size(inner)
        if size is not None and size > _LARGEST_SMALL_FILE:
            raise UserError(f"{path} is larger than {_LARGEST_SMALL_FILE >> 20} MiB; check that it is the right file")

        return fs.cat_file(inner)


def file_system(url: str) -> tuple[Any, str]:
    """Returns the file system of a path or URL, and the path within it.

    Raises UserError if a package for it is missing.
    """
    local = os.path.expanduser(url)
    if os.path.lexists(local):  # an existing local file, even if its name looks like a URL
        return fsspec.filesystem("file"), os.path.abspath(local) + "/" * (local.endswith("/") and local != "/")

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}; install what it names, or use a local path") from None


def suffix(path: str) -> str:
    """Returns the lower-case suffix of a name, with its dot."""
    # Systems that ignore case write suffixes in either case.
    return posixpath.splitext(_plain(path))[1].lower()


def _plain(path: str) -> str:
    """Returns a path without a URL query and without a shard number after the suffix."""
    return _SHARD.sub("", _QUERY.sub("", path))


def _protocols(fs: Any) -> tuple[str, ...]:
    """Returns the protocols of a file system."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Converts errors of reading to a UserError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file; check the path") from None
    except OSError as error:
        # The remedy differs: not the file is at fault, but the limit of the process.
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UserError(f"{name}: cannot be read (too many open files); raise the limit with ulimit -n") from None
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be read ({reason}); check its permissions and its kind") from None
