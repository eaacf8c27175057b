"""ArrayRecord files: one document per record, located by the record's index."""

import contextlib
import enum
import functools
from collections.abc import Iterator
from typing import Any

from looplm_jax.config import RecordKind, SourceConfig
from looplm_jax.data.documents import Document
from looplm_jax.data.sources.bad_records import BadRecord, BadRecordPolicy
from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.formats import Found, Span, ranges
from looplm_jax.data.sources.records import decode, load_json, record_document, too_long, value_document
from looplm_jax.data.sources.spooled import SpooledFile
from looplm_jax.data.sources.tf_example import parse_example
from looplm_jax.errors import UserError

_AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
_IN_ORDER = "readahead_buffer_size:1M,max_parallelism:1"
_READ_BUFFER = 2**15  # bytes
_OPEN_FILES = 128  # open files per process
_BLOCK = 256  # records in memory at a time


class Encoding(enum.Enum):
    """The encoding of a file's records, determined by the first record."""

    JSON = "JSON objects"
    EXAMPLE = "tf.train.Example"
    TEXT = "text"


class ArrayRecord:
    """The ArrayRecord format, with records in any `Encoding`. A place is the index of a record."""

    def spans(self, file: DataFile, unit_bytes: int) -> tuple[Span, ...]:
        """Returns ranges of records, each with as many records as fill a unit on average."""
        records = _opened(file, file.version).num_records()
        return ranges(records, records * unit_bytes // max(file.size, 1))

    def scan(self, file: DataFile, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[Found]:
        """Yields the documents of a range of records, with one block of records in memory at a time."""
        reader = _open(file, _IN_ORDER)
        encoding = _encoding(file, file.version)

        for block in range(span.start, min(span.end, reader.num_records()), _BLOCK):
            stop = min(block + _BLOCK, span.end, reader.num_records())
            for number, record in enumerate(_read(file, reader, block, stop), start=block):
                try:
                    document = _document(record, encoding, source, file.limits.record_bytes)
                except BadRecord as problem:
                    bad.handle(lambda number=number: f"{file.name}: record {number}", problem)  # type: ignore[misc]
                    continue
                if document:
                    yield Found((number, 0), document)

    def read(self, file: DataFile, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns the document of one record. Thread-safe."""
        [record] = _read(file, _opened(file, file.version), place[0], place[0] + 1)
        return _document(record, _encoding(file, file.version), source, file.limits.record_bytes)


# Records


def _document(record: bytes, encoding: Encoding, source: SourceConfig, limit: int) -> Document:
    """Decodes a record. Raises BadRecord."""
    if len(record) > limit:
        raise too_long(limit)
    # A chat is structured, so it is parsed as JSON even if the first record was not an object.
    if encoding is Encoding.TEXT and source.kind is RecordKind.TEXT:
        return value_document(decode(record, "record", "utf-8-sig"), source)

    if encoding is not Encoding.EXAMPLE:
        return record_document(load_json(record), source)

    features = parse_example(record)
    if features is None:
        raise BadRecord("not a tf.train.Example, as the first record is")
    return record_document({name: _feature(value, name, source) for name, value in features.items()}, source)


def _feature(value: bytes | None, name: str, source: SourceConfig) -> Any:
    """Decodes the feature that the source reads: a text, or the messages of a chat as JSON.

    Others are returned unchanged.
    """
    if name != source.key or value is None:
        return value
    return load_json(value) if source.kind is RecordKind.CHAT else decode(value, f"feature {name!r}", "utf-8-sig")


@functools.lru_cache(maxsize=_OPEN_FILES)
def _encoding(file: DataFile, version: tuple[int, int]) -> Encoding:
    """Returns the encoding of a file's records.

    The version is part of the cache key, so changed files are read again.
    """
    reader = _opened(file, version)
    first = _read(file, reader, 0, 1)[0] if reader.num_records() else b""
    if parse_example(first) is not None:
        return Encoding.EXAMPLE

    # A text may begin with valid JSON, such as a number; only an object counts as a record.
    try:
        return Encoding.JSON if isinstance(load_json(first), dict) else Encoding.TEXT
    except BadRecord:
        return Encoding.TEXT


# Readers


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(file: DataFile, version: tuple[int, int]) -> Any:
    """Returns a cached reader that threads may share. The least recently used readers are closed."""
    return _open(file, _AT_RANDOM)


def _open(file: DataFile, options: str) -> Any:
    """Opens a reader."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(_path(file), options, file_reader_buffer_size=_READ_BUFFER)
    if not reader.ok():
        with _readable(file):
            reader.read([0])  # raises with the reason
    return reader


def _path(file: DataFile) -> str:
    """Returns a path that ArrayRecord can open: a local path or a gs:// URL. Files elsewhere are copied."""
    return file.path if file.is_local else file.name if file.name.startswith("gs://") else _copied(file).path


@functools.lru_cache(maxsize=_OPEN_FILES)
def _copied(file: DataFile) -> SpooledFile:
    """Returns a cached local copy of a remote file."""
    return SpooledFile(file)


def _read(file: DataFile, reader: Any, start: int, stop: int) -> list[bytes]:
    """Reads a range of records."""
    with _readable(file):
        return reader.read(start, stop)


@contextlib.contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    """Converts the errors of ArrayRecord to a UserError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file.name}: cannot be read as ArrayRecord ({reason}); copy or make the file again") from None
