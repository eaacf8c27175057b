"""The documents of a source: its files or dataset by path, read as a stream or by index."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.config import OnBadRecord, ReadLimits, RecordKind, SourceConfig
from looplm_jax.data._documents import Document, document_key
from looplm_jax.data.sources import _huggingface as huggingface
from looplm_jax.data.sources._array_record import ArrayRecord
from looplm_jax.data.sources._discovery import describe, find_files
from looplm_jax.data.sources._files import DataFile, file_system, readable
from looplm_jax.data.sources._formats import WHOLE, BadRecord, BadRecordPolicy, Format, Span
from looplm_jax.data.sources._jsonl import JsonLines
from looplm_jax.data.sources._parquet import Parquet
from looplm_jax.data.sources._spool import Spool, seekable
from looplm_jax.data.sources._text import Text
from looplm_jax.errors import UserError

Input = DataFile | huggingface.Dataset
"""Documents that are read together."""

# By suffix; any other file is text.
_FORMATS: dict[str, Format] = {
    ".array_record": ArrayRecord(),
    ".arrayrecord": ArrayRecord(),
    ".json": JsonLines(),
    ".jsonl": JsonLines(),
    ".ndjson": JsonLines(),
    ".parquet": Parquet(),
    huggingface.PREFIX: huggingface.HuggingFace(),
}


# Resolution of paths to inputs, and of inputs to formats


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files or the dataset that a path resolves to, and the number of files left out, by kind."""

    found: tuple[Input, ...]
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Input]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


def find_inputs(path: str, source: SourceConfig | None = None, limits: ReadLimits | None = None) -> Inputs:
    """Returns the files of a path, glob, folder or URL, or a dataset.

    Args:
      path: a path, glob, folder, URL or dataset name.
      source: the field to read, and whether records are chats; texts by default.
      limits: limits on reading.

    Raises:
      UserError: nothing is found, or a file cannot be read as data (see `find_files`).
    """
    problems = source is not None and source.kind is RecordKind.PROBLEM
    if path.startswith(huggingface.PREFIX):
        if problems:
            raise _no_problems(path)
        return Inputs((huggingface.Dataset(path),))

    with readable(path):
        fs, inner = file_system(path)
        # A saved dataset is a folder of Arrow files, which must not be searched for data files.
        saved = not fs.isfile(inner) and fs.isdir(inner) and huggingface.is_saved_dataset(fs, inner)
    if saved:
        if problems:
            raise _no_problems(path)
        return Inputs((huggingface.Dataset(path),))

    found = find_files(path, source, limits)
    # A problem has two fields, and the other formats read a single column.
    other = next((file for file in found.files if not isinstance(format_of(file), JsonLines)), None)
    if problems and other is not None:
        raise _no_problems(other.name)
    return Inputs(tuple(map(_checked, found.files)), found.left_out)


def _no_problems(name: str) -> UserError:
    """Returns the error for data in which problems cannot be read."""
    return UserError(f"{name} holds no problems; give .jsonl files, with a prompt and an answer in each line")


def summarize(inputs: Iterable[Inputs]) -> str:
    """Returns one line with the numbers of files to read and of files left out, by kind."""
    read, left_out = Counter[str](), Counter[str]()
    for one in inputs:
        read.update(map(_kind, one))
        left_out.update(one.left_out)

    noun = "file" if sum(read.values()) == 1 else "files"
    count, _, kinds = describe(read).partition(" ")
    return f"reading {count} {noun} {kinds}" + (f"; left out {describe(left_out)}" if left_out else "")


def _kind(file: Input) -> str:
    """Returns the kind of a file, for display."""
    if isinstance(file, huggingface.Dataset):
        return "dataset"

    compression = file.compression.value if file.compression else ""
    if file.content_suffix:
        return f"{file.content_suffix}{compression} by content"
    return f"{file.suffix}{compression}" or "text without an ending"


def format_of(file: Any) -> Format:
    """Returns the format that a file's name implies. The default is text."""
    return _FORMATS.get(file.suffix, Text())


def _checked(file: DataFile) -> DataFile:
    """Returns the file. Raises UserError if its format cannot be read from compressed data or from its server."""
    # Parquet and ArrayRecord are read at random positions, which compressed data does not have.
    if file.compression and not isinstance(format_of(file), JsonLines | Text):
        raise UserError(f"{file.name}: such files are compressed inside; decompress it, and leave off the last ending")
    # Compressed files are read from beginning to end; all others need random access.
    if not (file.compression or file.in_parts):
        raise UserError(
            f"{file.name}: the server does not support reading parts of files; download it, and name the copy"
        )
    return file


# Streaming


def scan(file: Input, source: SourceConfig, bad: BadRecordPolicy, span: Span | None = None) -> Iterator[Document]:
    """Yields every document of a file, or of one span of it, in order, in one pass and bounded memory.

    Raises:
      UserError: the file cannot be read, or has a bad record (with file and line in the message) and `bad` stops at it.
    """
    return (found.document for found in format_of(file).scan(file, source, bad, span or WHOLE))


def spans(file: Input, unit_bytes: int) -> tuple[Span, ...]:
    """Returns spans of about `unit_bytes` that together contain exactly the documents of a file.

    A compressed file is a single span. The result is a pure function of the file and the unit size.
    """
    return format_of(file).spans(file, unit_bytes)


# Random access


@dataclasses.dataclass(frozen=True, eq=False)
class FileIndex:
    """The N documents of one file by index: the place of each, and its `splits.document_key`."""

    file: Input
    source: SourceConfig
    places: Int64[np.ndarray, "N 2"]
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> Document:
        """Reads a document from the file. Raises UserError if the file has changed and the document is gone."""
        # What the two numbers mean is up to the format, for example an offset and a length.
        first, second = map(int, self.places[index])
        try:
            if document := format_of(self.file).read(self.file, self.source, (first, second)):
                return document
            problem: Exception = BadRecord("the document is gone")
        except UserError:
            raise
        except (ValueError, IndexError) as error:  # a bad record, or an error of pyarrow
            problem = error
        raise UserError(f"{self.file.name}: changed since it was opened ({problem}); start again")


class FileSource:
    """The documents of several files, in the order of the files.

    Args:
      pattern: the path of the source, for messages.
      shards: the documents of each file.
      skipped: the number of bad records that were skipped.
    """

    def __init__(self, pattern: str, shards: Sequence[FileIndex], skipped: int):
        self._pattern = pattern
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard.keys) for shard in shards])
        self.skipped = skipped

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
        # `right`, because an index equal to an end belongs to the next file.
        shard = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[shard - 1]) if shard else 0
        return self._shards[shard].read(index - before)

    @property
    def keys(self) -> UInt64[np.ndarray, "N"]:
        """The `splits.document_key` of each of the N documents."""
        return np.concatenate([shard.keys for shard in self._shards])

    def __repr__(self) -> str:
        return f"FileSource({self._pattern!r}, documents={len(self)})"


def open_files(
    source: SourceConfig,
    *,
    on_bad_record: OnBadRecord = OnBadRecord.STOP,
    limits: ReadLimits | None = None,
    files: Inputs | None = None,
) -> FileSource:
    """Opens the documents of a path, glob, folder, fsspec URL or dataset for random access.

    Every file is scanned once to index its documents; no text is kept in memory. The content of compressed files is
    written to one temporary file, which can be read at random.

    Args:
      source: the source.
      on_bad_record: how to treat records that cannot be read.
      limits: limits on reading.
      files: the result of `find_inputs` for the source, if it was called before.

    Raises:
      UserError: nothing matches, a file cannot be read or has a bad record (with file and line in the message), or
        there is no text at all.
    """
    files = files or find_inputs(source.path, source, limits)
    bad, spool = BadRecordPolicy(on_bad_record), Spool()
    # Arguments are evaluated in order, so `bad.skipped` is read after all files are indexed.
    found = FileSource(source.path, [_index(file, source, bad, spool) for file in files], bad.skipped)

    if len(found) == 0:
        skipped = f" ({bad.skipped} bad records were left out)" if bad.skipped else ""
        raise UserError(f"{source.path}: the {len(files)} files hold no text{skipped}; give files with text in them")

    return found


def _index(file: Input, source: SourceConfig, bad: BadRecordPolicy, spool: Spool) -> FileIndex:
    """Scans a file and returns the index of its documents."""
    file = seekable(file, spool)
    # 16 bytes for the place and 8 for the key of each document; the text is dropped.
    places, keys = [], []
    for found in format_of(file).scan(file, source, bad, WHOLE):
        places.append(found.place)
        keys.append(document_key(found.document))
    return FileIndex(file, source, np.array(places, dtype=np.int64).reshape(-1, 2), np.array(keys, dtype=np.uint64))
