"""Compressed files as streams of what is in them."""

import contextlib
import enum
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

from looplm_jax.errors import UserError

_BUFFER_BYTES = 2**20
_INPUT_BYTES = 2**15  # few, since what comes out can be thousands of times as much
_LARGEST_WINDOW = 2**31  # what `zstd --long=31` makes


class Compression(enum.Enum):
    """How a file is compressed; the value is how its name ends."""

    GZIP = ".gz"
    ZSTD = ".zst"

    @classmethod
    def by_suffix(cls, suffix: str) -> "Compression | None":
        """The compression that an ending in small letters means."""
        return next((compression for compression in cls if compression.value == suffix), None)


@contextlib.contextmanager
def decompressed(stream: IO[bytes], compression: Compression, name: str) -> Iterator[IO[bytes]]:
    """The content of a compressed stream, of all its members or frames, in bounded memory.

    Raises:
      UserError: while it is read, where the data end too early or are not what the name says.
    """
    try:
        if compression is Compression.GZIP:
            yield io.BufferedReader(gzip.GzipFile(fileobj=stream), _BUFFER_BYTES)
        else:
            yield io.BufferedReader(_ZstdStream(stream), _BUFFER_BYTES)
    except EOFError:
        raise UserError(f"{name}: the compressed data end too early; copy or download the file again") from None
    except (gzip.BadGzipFile, zlib.error, _CorruptZstd) as error:
        raise UserError(
            f"{name}: damaged, or not compressed as its name says ({error}); copy or download the file again"
        ) from None


class _CorruptZstd(ValueError):
    """The library's own error, which is not imported before it is needed."""


class _ZstdStream(io.RawIOBase):
    """Frame after frame. The library's own reader takes a frame that is cut off for a whole one."""

    def __init__(self, stream: IO[bytes]):
        import zstandard

        self._stream = stream
        self._context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer as far as one piece goes; 0 at the end."""
        while not self._output:
            self._input = self._input or self._stream.read(_INPUT_BYTES)
            if not self._input:
                return self._end()
            self._output = memoryview(self._decompress())
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self) -> bytes:
        if self._frame is None:
            self._frame = self._context.decompressobj()
        try:
            output = self._frame.decompress(self._input)
        except self._error as error:
            raise _CorruptZstd(str(error)) from None
        self._input = self._frame.unused_data if self._frame.eof else b""
        if self._frame.eof:
            self._frame = None
        return output

    def _end(self) -> int:
        if self._frame is not None:
            raise EOFError
        return 0
