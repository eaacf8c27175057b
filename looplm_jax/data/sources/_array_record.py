"""ArrayRecord files: one document per record, located by the record's index."""

import contextlib
import enum
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from looplm_jax.config import RecordKind, SourceConfig
from looplm_jax.data._documents import Document
from looplm_jax.data.sources._files import DataFile
from looplm_jax.data.sources._formats import (
    BadRecord,
    BadRecordPolicy,
    FoundDocument,
    Span,
    decode,
    load_json,
    ranges,
    record_document,
    too_long,
    value_document,
)
from looplm_jax.data.sources._spool import SpooledFile
from looplm_jax.errors import UserError

# Reading ahead costs memory and helps only if the next records are wanted.
_AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"
_IN_ORDER = "readahead_buffer_size:1M,max_parallelism:1"
_READ_BUFFER = 2**15  # bytes
_OPEN_FILES = 128  # open files per process
_BLOCK = 256  # records in memory at a time

_PACKAGE = "looplm_jax.example"  # not `tensorflow`, which may be registered in the same process


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

    def scan(self, file: DataFile, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[FoundDocument]:
        """Yields the documents of a range of records, with one block of records in memory at a time."""
        # A reader of its own, because those for random access are shared by threads.
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
                    yield FoundDocument((number, 0), document)

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
    # The constructor reports no error; the first read does.
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


# Parsing of `tf.train.Example` without TensorFlow: protobuf reads a message type that is declared here


def parse_example(record: bytes) -> Mapping[str, bytes | None] | None:
    """Returns the features of a serialized example by name.

    The value is the bytes of a feature that holds exactly one bytes value, and None for any other feature. The result
    is None if the record is not an example, or has no features.
    """
    from google.protobuf.message import DecodeError

    example = _example_class()()
    try:
        example.ParseFromString(record)
    except DecodeError:
        return None
    # Unrelated bytes can parse as a message. They are recognized by missing or unnamed features.
    features = example.features.feature
    if not features or "" in features:
        return None
    return {name: _only_value(feature.bytes_list.value) for name, feature in features.items()}


def _only_value(values: Any) -> bytes | None:
    """Returns the only value of a list, or None."""
    return values[0] if len(values) == 1 else None


@functools.cache
def _example_class() -> Any:
    """Returns the message class, with the field numbers and types of TensorFlow's `example.proto` and `feature.proto`.

    Lists of floats and integers are not declared, because they hold no text.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="looplm_jax/example.proto", package=_PACKAGE, syntax="proto3")

    def declare(message: Any, field: str, number: int, kind: int, label: int = kinds.LABEL_OPTIONAL) -> Any:
        return message.field.add(name=field, number=number, type=kind, label=label)

    byte_list = file.message_type.add(name="BytesList")
    declare(byte_list, "value", 1, kinds.TYPE_BYTES, kinds.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    declare(feature, "bytes_list", 1, kinds.TYPE_MESSAGE).type_name = f".{_PACKAGE}.BytesList"

    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    declare(entry, "key", 1, kinds.TYPE_STRING)
    declare(entry, "value", 2, kinds.TYPE_MESSAGE).type_name = f".{_PACKAGE}.Feature"

    entries = declare(features, "feature", 1, kinds.TYPE_MESSAGE, kinds.LABEL_REPEATED)
    entries.type_name = f".{_PACKAGE}.Features.FeatureEntry"
    declare(
        file.message_type.add(name="Example"), "features", 1, kinds.TYPE_MESSAGE
    ).type_name = f".{_PACKAGE}.Features"

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))
