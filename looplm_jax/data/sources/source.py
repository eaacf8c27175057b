"""Documents of files, streamed or by index."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.config import OnBadRecord, ReadLimits, SourceConfig
from looplm_jax.data.documents import Document
from looplm_jax.data.sources.bad_records import BadRecord, BadRecordPolicy
from looplm_jax.data.sources.by_name import Input, Inputs, find_inputs, format_of
from looplm_jax.data.sources.formats import WHOLE, Span
from looplm_jax.data.sources.spooled import Spool, seekable
from looplm_jax.data.splits import document_key
from looplm_jax.errors import UserError

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
class Shard:
    """The N documents of one file by index: the place of each, and its `splits.document_key`."""

    file: Input
    source: SourceConfig
    places: Int64[np.ndarray, "N 2"]
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> Document:
        """Reads a document from the file. Raises UserError if the file has changed and the document is gone."""
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

    def __init__(self, pattern: str, shards: Sequence[Shard], skipped: int):
        self._pattern = pattern
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard.keys) for shard in shards])
        self.skipped = skipped

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(index)
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


def _index(file: Input, source: SourceConfig, bad: BadRecordPolicy, spool: Spool) -> Shard:
    """Scans a file and returns the index of its documents."""
    file = seekable(file, spool)
    places, keys = [], []
    for found in format_of(file).scan(file, source, bad, WHOLE):
        places.append(found.place)
        keys.append(document_key(found.document))
    return Shard(file, source, np.array(places, dtype=np.int64).reshape(-1, 2), np.array(keys, dtype=np.uint64))
