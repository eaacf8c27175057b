"""Shards: ArrayRecord files of packed sequences, written once and read at random, and the encoding of a sequence.

A sequence of S positions consists of segments. A segment of n positions is stored as n + 1 tokens: the inputs are all
but the last, the targets all but the first. All numbers are little-endian:

    uint32 K              number of segments
    uint32 R              number of runs in the loss mask
    uint32 [K]            positions of each segment
    uint32 [R]            lengths of the runs, which alternate between target and no target; the first may be 0
    uint16 or uint32 []   tokens of all segments, positions + K of them
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from looplm_jax.corpus._format import PreparedFolder, Shard
from looplm_jax.data._examples import Example
from looplm_jax.data.sources._files import DataFile, file_system
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE, AnyPath

_COUNT = np.dtype("<u4")
_SHORT, _LONG = np.dtype("<u2"), np.dtype("<u4")

_WRITE_OPTIONS = "group_size:1"  # one record per group, so that a record can be read on its own
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READ_BUFFER = 2**15  # bytes
_OPEN_SHARDS = 256  # open files per process, over all sources and substreams
_EDGE = 2**12  # bytes at each end of a file that are checked at every start


class BadSequence(ValueError):
    """Raised for bytes that do not encode a packed sequence."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """A piece of a document with N positions, stored as N + 1 tokens."""

    tokens: Int32[np.ndarray, "N+1"]
    loss_mask: Bool[np.ndarray, "N"]

    @property
    def positions(self) -> int:
        """The number of positions, N."""
        return len(self.loss_mask)


# Segments


def pieces(example: Example, length: int) -> list[Segment]:
    """Splits an example into segments of at most `length` positions.

    The last token of a segment is the first of the next, so every target appears exactly once. Segments without a
    target are dropped.
    """
    mask = example.loss_mask[1:]
    starts = range(0, len(mask), length)
    segments = (Segment(example.tokens[start : start + length + 1], mask[start : start + length]) for start in starts)
    return [segment for segment in segments if segment.loss_mask.any()]


def token_type(vocab_size: int) -> np.dtype:
    """Returns the dtype in which tokens of a vocabulary are stored: 16 bits if they suffice."""
    return _SHORT if vocab_size <= 1 << 16 else _LONG


# Encoding


def encode_sequence(segments: Sequence[Segment], tokens: np.dtype) -> bytes:
    """Returns the encoding of a sequence that consists of these segments."""
    runs = _runs(np.concatenate([segment.loss_mask for segment in segments]))
    lengths = [segment.positions for segment in segments]
    head = np.array([len(segments), len(runs), *lengths, *runs], _COUNT)
    return head.tobytes() + np.concatenate([segment.tokens for segment in segments]).astype(tokens).tobytes()


# Decoding


def decode_segments(record: bytes, tokens: np.dtype) -> list[Segment]:
    """Returns the segments of an encoded sequence, the inverse of `encode_sequence`. Raises BadSequence."""
    parts = _parts(record, tokens)
    stops = np.cumsum(parts.lengths)
    masks = np.split(parts.mask, stops[:-1])
    # Each segment has one token more than positions.
    ids = np.split(parts.tokens, (stops + np.arange(1, len(stops) + 1))[:-1])
    return [Segment(tokens, mask) for tokens, mask in zip(ids, masks, strict=True)]


def decode_sequence(record: bytes, length: int, tokens: np.dtype) -> Mapping[str, np.ndarray]:
    """Returns an encoded sequence as features of shape [length], named as Grain names packed features.

    Raises BadSequence.
    """
    parts = _parts(record, tokens)
    used = len(parts.mask)
    if used > length:
        raise BadSequence(f"it holds {used} positions")

    stops = np.cumsum(parts.lengths)
    extra = np.arange(len(stops))  # additional tokens of earlier segments, one each
    starts = stops - parts.lengths

    # Deleting the last token of each segment gives the inputs; deleting the first gives the targets.
    return {
        "tokens": _padded(np.delete(parts.tokens, stops + extra), length, np.int32),
        "targets": _padded(np.delete(parts.tokens, starts + extra), length, np.int32),
        "tokens_segment_ids": _padded(np.repeat(extra + 1, parts.lengths), length, np.int32),
        "tokens_positions": _padded(np.arange(used) - np.repeat(starts, parts.lengths), length, np.int32),
        "loss_mask": _padded(parts.mask, length, np.float32),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class _Parts:
    """The decoded fields of a sequence: segment lengths, loss mask and tokens."""

    lengths: np.ndarray
    mask: np.ndarray
    tokens: np.ndarray


def _parts(record: bytes, tokens: np.dtype) -> _Parts:
    """Decodes the fields of a sequence and checks that their lengths agree. Raises BadSequence."""
    if len(record) < 2 * _COUNT.itemsize:
        raise BadSequence("it is too short")

    segments, runs = (int(count) for count in np.frombuffer(record, _COUNT, 2))
    head = (2 + segments + runs) * _COUNT.itemsize
    if segments == 0 or len(record) < head or (len(record) - head) % tokens.itemsize:
        raise BadSequence("its parts do not fit its length")

    lengths, spans = np.split(np.frombuffer(record, _COUNT, segments + runs, 2 * _COUNT.itemsize), [segments])
    lengths, spans = lengths.astype(np.int64), spans.astype(np.int64)
    ids = np.frombuffer(record, tokens, offset=head)
    if lengths.sum() != spans.sum() or len(ids) != lengths.sum() + segments:
        raise BadSequence("its parts do not fit each other")

    # Runs alternate, and the first is a run of targets.
    mask = np.repeat(np.arange(runs) % 2 == 0, spans)
    return _Parts(lengths, mask, ids.astype(np.int32))


def _runs(mask: Bool[np.ndarray, "N"]) -> list[int]:
    """Returns the lengths of runs of equal values. The first run is of true values and may be empty."""
    edges = np.flatnonzero(np.diff(mask)) + 1
    lengths = np.diff([0, *edges, len(mask)]).tolist()
    return lengths if mask[0] else [0, *lengths]


def _padded(values: np.ndarray, length: int, kind: type) -> np.ndarray:
    """Returns values in an array of `length`, padded with zeros."""
    row: np.ndarray = np.zeros(length, kind)
    row[: len(values)] = values
    return row


# Shards


# Writing


def write_shard(
    rows: Iterable[list[Segment]], tokens: np.dtype, scratch: Path, folder: PreparedFolder, name: str
) -> Shard | None:
    """Writes sequences to a file in the scratch folder and moves it to its final name.

    Args:
      rows: the sequences, as lists of segments.
      tokens: the dtype of stored tokens.
      scratch: the folder for unfinished files.
      folder: the prepared corpus.
      name: the name of the shard.

    Returns:
      The description of the shard, with `documents` 0, or None, without writing a file, if there are no sequences.

    Raises:
      UserError: the file system refuses.
    """
    file = scratch / name
    written = positions = 0
    writer = None

    for row in rows:
        positions += sum(segment.positions for segment in row)

        record = encode_sequence(row, tokens)
        with _refused(folder.at(name)):
            # The file is created with the first sequence, so a unit without sequences leaves no file.
            writer = writer or _writer(file)
            writer.write(record)
        written += 1

    if writer is None:
        return None
    with _refused(folder.at(name)):
        writer.close()

    content = file.read_bytes()
    folder.publish(file, name)

    return Shard(
        name=name,
        rows=written,
        tokens=positions,
        documents=0,
        bytes=len(content),
        digest=file_digest(content),
        edges=file_digest(content[:_EDGE] + content[-_EDGE:]),
    )


# Reading and verification


def read_record(folder: PreparedFolder, shard: Shard, row: int) -> bytes:
    """Returns the bytes of one sequence. Thread-safe. Raises UserError if the file is missing or damaged."""
    try:
        return _reader(str(folder.at(shard.name)), shard.digest, shard.rows).read([row])[0]
    except RuntimeError as error:
        raise damaged(folder, shard, str(error)) from None


def check_shard(folder: PreparedFolder, shard: Shard) -> str | None:
    """Returns the problem with a shard, which is read completely, or None if it is intact."""
    try:
        content = folder.read(shard.name)
    except FileNotFoundError:
        return "there is no such file"
    if len(content) != shard.bytes:
        return f"it has {len(content):,} bytes, not {shard.bytes:,}"
    return None if file_digest(content) == shard.digest else "its bytes have changed"


def check_edges(folder: PreparedFolder, shard: Shard) -> str | None:
    """Returns the problem with the size, the first or the last bytes of a shard, or None if they are intact."""
    try:
        file = DataFile(*file_system(str(folder.at(shard.name))))
        if file.size != shard.bytes:
            return f"it has {file.size:,} bytes, not {shard.bytes:,}"
        if not shard.edges:
            return None
        # Two small reads, so the cost of the check does not depend on the size of the shard.
        edges = file.read(0, _EDGE) + file.read(max(shard.bytes - _EDGE, 0), shard.bytes)
    except UserError as error:
        return str(error)
    return None if file_digest(edges) == shard.edges else "its bytes have changed"


def file_digest(content: bytes) -> str:
    """Returns BLAKE2b of the content, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def damaged(folder: PreparedFolder, shard: Shard, why: str) -> UserError:
    """Returns the error for a shard that differs from what was written."""
    reason = " ".join(why.split())
    return UserError(
        f"{folder.at(shard.name)} is damaged or missing ({reason}); copy it again, or remove it and run the "
        "same `looplm tokenize` command again"
    )


# ArrayRecord


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _reader(path: str, digest: str, rows: int) -> Any:
    """Returns an open reader, cached; the least recently used are closed.

    The digest distinguishes versions of a file.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, _READ_OPTIONS, file_reader_buffer_size=_READ_BUFFER)
    if reader.num_records() != rows:  # also true if there is no file
        raise RuntimeError(f"it holds {reader.num_records()} sequences, not {rows}")
    return reader


def _writer(file: Path) -> Any:
    """Opens an ArrayRecord writer."""
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(file), _WRITE_OPTIONS)


@contextlib.contextmanager
def _refused(name: AnyPath) -> Iterator[None]:
    """Converts ArrayRecord's only kind of error to a UserError.

    Its message starts with the failed call and the reason given by the system.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("failed: ")[2].partition(";")[0] or " ".join(str(error).split())
        reason = NO_SPACE if reason == "No space left on device" else reason
        raise UserError(f"{name} cannot be written ({reason}); fix that and run the same command again") from None
