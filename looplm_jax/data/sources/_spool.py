"""Local temporary storage for files that do not support random access."""

import contextlib
import io
import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import IO, Any

from looplm_jax.data.sources._files import DataFile
from looplm_jax.errors import UserError

_BLOCK = 2**20  # bytes decompressed at a time


class Spool:
    """An unnamed temporary file for the content of any number of files. It disappears with the process.

    The file is created on the first write. Pickling a spool gives an empty one.
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None
        self.end = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # A descriptor means nothing in another process.
        return Spool, ()

    @property
    def path(self) -> str:
        """A path at which this process can open the file."""
        return f"/dev/fd/{self._opened()}"

    def append(self, block: bytes, name: str) -> None:
        """Appends a block. Raises UserError, with the name of its origin, if the disk is full."""
        # A view, so that the rest after a partial write is not copied.
        descriptor, left = self._opened(), memoryview(block)
        with _room(name):
            while left:
                # A write may be partial.
                written = os.write(descriptor, left)
                left = left[written:]
                self.end += written

    def read(self, start: int, count: int) -> bytes:
        """Returns `count` bytes at offset `start`. Thread-safe."""
        # `pread` has no shared position, so threads do not disturb each other.
        return os.pread(self._opened(), count, start)

    def _opened(self) -> int:
        """Returns the file descriptor and creates the file if necessary."""
        if self._descriptor is None:
            with _room("a temporary file"):
                self._descriptor, path = tempfile.mkstemp()
            # The file has no name from here on, so the system frees it even if the process is killed.
            os.unlink(path)
            weakref.finalize(self, os.close, self._descriptor)
        return self._descriptor


class SpooledFile:
    """The decompressed content of a file, stored in a spool. It can be used in place of a `DataFile`.

    Args:
      origin: the file, which is read completely.
      spool: the storage to append to; a new one by default.

    Raises:
      UserError: the disk has no room for the content.
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
        # The receiving process decompresses the file again, into a spool of its own.
        return SpooledFile, (self._origin, self._spool)

    @property
    def path(self) -> str:
        """A path at which this process can open the file. Valid only if no other file is in the spool."""
        return self._spool.path

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Returns bytes `start..end` of the content. Thread-safe."""
        start = start or 0
        end = self.size if end is None else min(end, self.size)
        return self._spool.read(self._start + start, max(end - start, 0))

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Yields the content as a stream."""
        yield io.BufferedReader(_Stream(self), _BLOCK)


class _Stream(io.RawIOBase):
    """A seekable stream over a spooled file."""

    def __init__(self, file: SpooledFile):
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a position and returns it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer up to the end of the file. Returns the number of bytes."""
        # Short reads are allowed: `BufferedReader` asks again until it gets none.
        content = self._file.read(self._place, self._place + len(buffer))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)


def seekable(file: Any, spool: Spool | None = None) -> Any:
    """Returns the file itself, or its decompressed content in a temporary file if it is compressed."""
    return SpooledFile(file, spool) if isinstance(file, DataFile) and file.compression else file


@contextlib.contextmanager
def _room(name: str) -> Iterator[None]:
    """Converts errors of writing temporary files to a UserError."""
    try:
        yield
    except OSError as error:
        folder = tempfile.tempdir or "a temporary folder"
        raise UserError(
            f"{name}: its content cannot be kept in {folder} ({error.strerror}); set TMPDIR to a folder with more "
            "room, or prepare the data with `looplm tokenize`, which keeps none"
        ) from None
