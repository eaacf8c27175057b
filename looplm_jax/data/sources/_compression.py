"""Decompression of files as streams, with limits on memory and on the compression ratio."""

import contextlib
import enum
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO, Any

from looplm_jax.config import ReadLimits
from looplm_jax.errors import UserError

# Lines are read from this buffer, so that short lines do not each cost a call of the decoder.
_BUFFER_BYTES = 2**20
_ALWAYS_ALLOWED = 2**30  # bytes of content that are allowed at any compression ratio


class Compression(enum.Enum):
    """A compression format. The value is its file name suffix."""

    GZIP = ".gz"
    ZSTD = ".zst"

    @classmethod
    def by_suffix(cls, suffix: str) -> "Compression | None":
        """Returns the compression for a lower-case suffix, or None."""
        return next((compression for compression in cls if compression.value == suffix), None)


@contextlib.contextmanager
def decompressed(
    stream: IO[bytes], compression: Compression, name: str, size: int | None, limits: ReadLimits
) -> Iterator[IO[bytes]]:
    """Yields the decompressed content of a stream, including all members or frames, in bounded memory.

    Args:
      stream: the compressed bytes.
      compression: the compression format.
      name: the name of the file, for error messages.
      size: the number of compressed bytes, if known.
      limits: limits on the decompressed content.

    Raises:
      UserError: during reading, if the data is truncated, has another format, or exceeds the limits.
    """
    raw = gzip.GzipFile(fileobj=stream) if compression is Compression.GZIP else _ZstdStream(stream, limits.window_bytes)

    try:
        yield io.BufferedReader(_Bounded(raw, name, size, limits.compression_ratio), _BUFFER_BYTES)
    except EOFError:
        raise UserError(f"{name}: the compressed data end too early; copy or download the file again") from None
    except _WindowTooLarge:
        raise UserError(
            f"{name}: needs a Zstandard window of more than {limits.window_bytes:,} bytes; raise "
            "data.limits.window_bytes, or compress it again without --long"
        ) from None
    except (gzip.BadGzipFile, zlib.error, _CorruptZstd) as error:
        raise UserError(
            f"{name}: damaged, or not compressed as its name says ({error}); copy or download the file again"
        ) from None


# Limits


class _Bounded(io.RawIOBase):
    """A stream that raises UserError once its content is far larger than its compressed size suggests."""

    def __init__(self, raw: Any, name: str, size: int | None, ratio: int):
        self._raw, self._name, self._ratio = raw, name, ratio
        # Without a known size there is nothing to compare with.
        self._left = None if size is None else max(_ALWAYS_ALLOWED, size * ratio)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer with at most one chunk. Returns the number of bytes, 0 at the end."""
        count = self._raw.readinto(buffer)
        if self._left is not None:
            self._left -= count
            if self._left < 0:
                raise UserError(
                    f"{self._name}: holds more than {self._ratio} times its compressed bytes; if that is right, raise "
                    "data.limits.compression_ratio, else leave the file out"
                )
        return count


# Zstandard


class _CorruptZstd(ValueError):
    """Represents the library's own error, because the library is imported only when needed."""


class _WindowTooLarge(ValueError):
    """Raised for a frame that requires more memory than allowed."""


_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
# RFC 8878, section 3.1.2.
_SKIPPABLE_FRAME = range(0x184D2A50, 0x184D2A60)
_RLE_BLOCK, _RESERVED_BLOCK = 1, 3


class _ZstdStream(io.RawIOBase):
    """A stream of decompressed Zstandard data that decodes frame by frame and block by block.

    A block expands to at most 128 KiB, however small it is, so each step adds no more than that to memory. The
    library's own reader is not used, because it accepts a truncated frame as complete.
    """

    def __init__(self, stream: IO[bytes], window: int):
        self._pieces = _zstd_contents(stream, window)
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer with at most one chunk. Returns the number of bytes, 0 at the end."""
        while not self._output:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._output = memoryview(piece)
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count


def _zstd_contents(stream: IO[bytes], window: int) -> Iterator[bytes]:
    """Yields the content of all frames, at most one block at a time."""
    import zstandard

    context = zstandard.ZstdDecompressor(max_window_size=window)
    while magic := stream.read(4):
        # Skippable frames hold metadata of other programs, not content.
        if len(magic) == 4 and int.from_bytes(magic, "little") in _SKIPPABLE_FRAME:
            _skip(stream, int.from_bytes(_exactly(stream, 4), "little"))
            continue

        # A truncated magic number passes, and is then reported as truncated data.
        if magic != _ZSTD_FRAME[: len(magic)]:
            raise _CorruptZstd("not a Zstandard frame")

        # One for each frame, because an object cannot be used beyond the end of its frame.
        frame = context.decompressobj()
        for piece in _frame_pieces(magic, stream):
            try:
                content = frame.decompress(piece)
            except zstandard.ZstdError as error:
                raise _WindowTooLarge if "too much memory" in str(error) else _CorruptZstd(str(error)) from None
            # An empty content is possible: the decoder may wait for the next block.
            yield content


def _frame_pieces(magic: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    """Yields the bytes of one frame (RFC 8878, section 3.1.1): its header, each block, and the checksum."""
    # The descriptor byte determines the length of the rest of the header.
    descriptor = _exactly(stream, 1)
    content_size, single_segment, dictionary = descriptor[0] >> 6, descriptor[0] >> 5 & 1, descriptor[0] & 3
    header = (0 if single_segment else 1) + (0, 1, 2, 4)[dictionary] + (single_segment, 2, 4, 8)[content_size]
    yield magic + descriptor + _exactly(stream, header)

    last = 0
    while not last:
        # A block header has a last-block flag, a 2-bit type and a 21-bit size.
        head = _exactly(stream, 3)
        number = int.from_bytes(head, "little")
        last, kind, size = number & 1, number >> 1 & 3, number >> 3
        if kind == _RESERVED_BLOCK:
            raise _CorruptZstd("a block of an unknown kind")
        # A run-length block stores one byte, and its size is the number of repetitions.
        yield head + _exactly(stream, 1 if kind == _RLE_BLOCK else size)

    if descriptor[0] & 4:
        yield _exactly(stream, 4)


def _exactly(stream: IO[bytes], count: int) -> bytes:
    """Reads exactly `count` bytes. Raises EOFError if there are fewer."""
    content = b""
    while len(content) < count:
        # A stream may return fewer bytes than requested before its end.
        piece = stream.read(count - len(content))
        if not piece:
            raise EOFError
        content += piece
    return content


def _skip(stream: IO[bytes], count: int) -> None:
    """Reads and discards `count` bytes."""
    while count:
        count -= len(_exactly(stream, min(count, _BUFFER_BYTES)))
