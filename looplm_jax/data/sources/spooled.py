"""Files that cannot be read in part where they lie, as temporary files of this machine."""

import contextlib
import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import IO, Any

from looplm_jax.data.sources.files import DataFile
from looplm_jax.errors import UserError

_BLOCK = 2**20


class SpooledFile:
    """The content of a file, decompressed, in a temporary file without a name: it is gone when the process is.

    Takes the place of a `DataFile`. Raises UserError where the disk has no room for it.
    """

    compression = None

    def __init__(self, origin: DataFile):
        self.name, self.suffix = origin.name, origin.suffix
        self._origin = origin
        self._descriptor = _nameless_file(self)
        with origin.open() as stream:
            while block := stream.read(_BLOCK):
                self._append(block)

    def __reduce__(self) -> tuple[Any, ...]:
        return SpooledFile, (self._origin,)

    @property
    def path(self) -> str:
        """A path by which this process can open it."""
        return f"/dev/fd/{self._descriptor}"

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return os.fstat(self._descriptor).st_size

    def read(self, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes `start..end`; safe from many threads."""
        start = start or 0
        return os.pread(self._descriptor, (self.size if end is None else end) - start, start)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The content as a stream."""
        with open(self.path, "rb") as stream:
            yield stream

    def _append(self, block: bytes) -> None:
        left = memoryview(block)
        with _room(self.name):
            while left:
                left = left[os.write(self._descriptor, left) :]


def seekable(file: Any) -> Any:
    """The file itself, or its content in a temporary file where it is compressed."""
    return SpooledFile(file) if isinstance(file, DataFile) and file.compression else file


def _nameless_file(owner: object) -> int:
    """The descriptor of a new file, which lives as long as its owner."""
    with _room("a temporary file"):
        descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor


@contextlib.contextmanager
def _room(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{name}: its content cannot be kept in {tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a folder "
            "with more room, or prepare the data with `looplm tokenize`, which keeps none"
        ) from None
