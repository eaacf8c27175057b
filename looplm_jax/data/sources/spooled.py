"""Files that cannot be read in part where they are, in a temporary file of this machine."""

import contextlib
import io
import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import IO, Any

from looplm_jax.data.sources.files import DataFile
from looplm_jax.errors import UserError

_BLOCK = 2**20


class Spool:
    """A temporary file without a name, for the content of any number of files: it is gone when the process is.

    It is made when the first byte is written. A copy in another process is empty.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self.end = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Spool, ()

    @property
    def path(self) -> str:
        """A path by which this process can open it."""
        return f"/dev/fd/{self._opened()}"

    def append(self, block: bytes, name: str) -> None:
        """Writes at the end. Raises UserError, with the name of what is written, where the disk has no room."""
        descriptor, left = self._opened(), memoryview(block)
        with _room(name):
            while left:
                written = os.write(descriptor, left)
                left = left[written:]
                self.end += written

    def read(self, start: int, count: int) -> bytes:
        """Returns `count` bytes from `start` on; safe from many threads."""
        return os.pread(self._opened(), count, start)

    def _opened(self) -> int:
        if self._descriptor is None:
            with _room("a temporary file"):
                self._descriptor, path = tempfile.mkstemp()
            os.unlink(path)
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor


class SpooledFile:
    """The content of a file, decompressed, as part of a spool.

    Takes the place of a `DataFile`. Raises UserError where the disk has no room for it.
    """

    compression = None

    def __init__(self, origin: DataFile, spool: Spool | None = None):
        self.name, self.suffix, self.limits = origin.name, origin.suffix, origin.limits
        self._origin, self._spool = origin, spool or Spool()
        self._start = self._spool.end
        with origin.open() as stream:
            while block := stream.read(_BLOCK):
                self._spool.append(block, self.name)
        self.size = self._spool.end - self._start

    def __reduce__(self) -> tuple[Any, ...]:
        return SpooledFile, (self._origin, self._spool)

    @property
    def path(self) -> str:
        """A path by which this process can open the file, if it is alone in its spool."""
        return self._spool.path

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Returns the bytes `start..end`; safe from many threads."""
        start = start or 0
        end = self.size if end is None else min(end, self.size)
        return self._spool.read(self._start + start, max(end - start, 0))

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Yields the content as a stream."""
        yield io.BufferedReader(_Stream(self), _BLOCK)


class _Stream(io.RawIOBase):
    """Reads a spooled file from its beginning."""

    def __init__(self, file: SpooledFile):
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place; returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer as far as the file goes."""
        content = self._file.read(self._place, self._place + len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def seekable(file: Any, spool: Spool | None = None) -> Any:
    """Returns the file itself, or its content in a temporary file where it is compressed."""
    return SpooledFile(file, spool) if isinstance(file, DataFile) and file.compression else file


@contextlib.contextmanager
def _room(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{name}: its content cannot be kept in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder "
            "with more room, or prepare the data with `looplm tokenize`, which keeps none"
        ) from None
