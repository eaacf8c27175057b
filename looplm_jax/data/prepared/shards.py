"""ArrayRecord files of rows: written once, read at random."""

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

_WRITING = "group_size:1"  # a row is read without its neighbours
_READING = "readahead_buffer_size:0,max_parallelism:0"
_READ_BUFFER = 2**15
_OPEN_SHARDS = 256  # files that a process has open at a time, of all sources and lanes together
_EDGE = 2**12


def write_shard(
    rows: Iterable[list[Segment]], tokens: np.dtype, scratch: Path, folder: PreparedFolder, name: str
) -> Shard | None:
    """Write rows to a file, and move it to its place whole; `documents` of the result is 0. No rows, no file.

    Raises:
      UserError: the place refuses.
    """
    file = scratch / name
    written = positions = 0
    writer = None
    for row in rows:
        positions += sum(segment.positions for segment in row)
        record = encode_row(row, tokens)
        with _refused(folder.at(name)):
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


def read_record(folder: PreparedFolder, shard: Shard, row: int) -> bytes:
    """The bytes of one row; safe from many threads. Raises UserError where the file is missing or damaged."""
    try:
        return _reader(str(folder.at(shard.name)), shard.digest, shard.rows).read([row])[0]
    except RuntimeError as error:
        raise damaged(folder, shard, str(error)) from None


def check_shard(folder: PreparedFolder, shard: Shard) -> str | None:
    """What is wrong with a file of rows, which is read whole; None if it is as it was written."""
    try:
        content = folder.read(shard.name)
    except FileNotFoundError:
        return "there is no such file"
    if len(content) != shard.bytes:
        return f"it has {len(content):,} bytes, not {shard.bytes:,}"
    return None if file_digest(content) == shard.digest else "its bytes have changed"


def check_edges(folder: PreparedFolder, shard: Shard) -> str | None:
    """Returns what is wrong with the length of a file of rows, or with its first and last bytes; None for nothing."""
    try:
        file = DataFile(*file_system(str(folder.at(shard.name))))
        if file.size != shard.bytes:
            return f"it has {file.size:,} bytes, not {shard.bytes:,}"
        if not shard.edges:
            return None
        edges = file.read(0, _EDGE) + file.read(max(shard.bytes - _EDGE, 0), shard.bytes)
    except UserError as error:
        return str(error)
    return None if file_digest(edges) == shard.edges else "its bytes have changed"


def file_digest(content: bytes) -> str:
    """BLAKE2b, in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def damaged(folder: PreparedFolder, shard: Shard, why: str) -> UserError:
    """The mistake of a shard that is not as it was written."""
    reason = " ".join(why.split())
    return UserError(
        f"{folder.at(shard.name)} is damaged or missing ({reason}); copy it again, or remove it and run the "
        "same `looplm tokenize` command again"
    )


@functools.lru_cache(maxsize=_OPEN_SHARDS)
def _reader(path: str, digest: str, rows: int) -> Any:
    """An open file. Those that were not used for the longest time are closed. `digest` tells its versions apart."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(path, _READING, file_reader_buffer_size=_READ_BUFFER)
    if reader.num_records() != rows:  # also where there is no file
        raise RuntimeError(f"it holds {reader.num_records()} rows, not {rows}")
    return reader


def _writer(file: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordWriter

    return ArrayRecordWriter(str(file), _WRITING)


@contextlib.contextmanager
def _refused(name: AnyPath) -> Iterator[None]:
    """ArrayRecord has one kind of error. It begins with the call that failed and the system's reason."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("failed: ")[2].partition(";")[0] or " ".join(str(error).split())
        reason = NO_SPACE if reason == "No space left on device" else reason
        raise UserError(f"{name} cannot be written ({reason}); mend that and run the same command again") from None
