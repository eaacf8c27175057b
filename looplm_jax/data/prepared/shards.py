"""Shards: ArrayRecord files of packed sequences, written once and read at random."""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import Shard
from looplm_jax.data.prepared.row import Segment, encode_row
from looplm_jax.data.sources.files import DataFile, file_system
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE, AnyPath

_WRITING = "group_size:1"  # one record per group, so that a record can be read on its own
_READING = "readahead_buffer_size:0,max_parallelism:0"
_READ_BUFFER = 2**15  # bytes
_OPEN_SHARDS = 256  # open files per process, over all sources and substreams
_EDGE = 2**12  # bytes at each end of a file that are checked at every start


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

        record = encode_row(row, tokens)
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

    reader = ArrayRecordReader(path, _READING, file_reader_buffer_size=_READ_BUFFER)
    if reader.num_records() != rows:  # also true if there is no file
        raise RuntimeError(f"it holds {reader.num_records()} rows, not {rows}")
    return reader


def _writer(file: Path) -> Any:
    """Opens an ArrayRecord writer."""
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(file), _WRITING)


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
