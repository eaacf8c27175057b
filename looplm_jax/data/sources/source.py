"""Documents of files: streamed, or by index."""

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


def scan(file: Input, source: SourceConfig, bad: BadRecordPolicy, span: Span | None = None) -> Iterator[Document]:
    """Every document of a file, or of one span of it, in order: one pass, bounded memory.

    Raises:
      UserError: the file cannot be read, or holds a bad record (file and line named) where `bad` stops at it.
    """
    return (found.document for found in format_of(file).scan(file, source, bad, span or WHOLE))


def spans(file: Input, unit_bytes: int) -> tuple[Span, ...]:
    """Where a file can be cut into parts of about `unit_bytes`, which together give exactly its documents.

    A compressed file is one span. The same file and size give the same spans.
    """
    return format_of(file).spans(file, unit_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class Shard:
    """The documents of one file, by index: where each of them lies, and its `splits.document_key`."""

    file: Input
    source: SourceConfig
    places: Int64[np.ndarray, "N 2"]
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> Document:
        """A document, read from the file. Raises UserError where it is no longer there."""
        first, second = map(int, self.places[index])
        try:
            if document := format_of(self.file).read(self.file, self.source, (first, second)):
                return document
            problem: Exception = BadRecord("the document is gone")
        except UserError:
            raise
        except (ValueError, IndexError) as error:  # a bad record, or what pyarrow raises
            problem = error
        raise UserError(f"{self.file.name}: changed since it was opened ({problem}); start again")


class FileSource:
    """The documents of many files, in the order of the files' names."""

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
        """`splits.document_key` of every document."""
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
    """Returns the documents of a path, glob, folder, fsspec URL or dataset. Every file is read once; no text is kept.

    The content of compressed files goes to one temporary file, to be read at random.

    Args:
      source: what is read.
      on_bad_record: what a record that cannot be read does.
      limits: of reading.
      files: what `find_inputs` returned for the source, where that was called before.

    Raises:
      UserError: nothing matches, a file cannot be read or holds a bad record (file and line named), or no text at all.
    """
    files = files or find_inputs(source.path, source, limits)
    bad, spool = BadRecordPolicy(on_bad_record), Spool()
    found = FileSource(source.path, [_index(file, source, bad, spool) for file in files], bad.skipped)
    if len(found) == 0:
        skipped = f" ({bad.skipped} bad records were left out)" if bad.skipped else ""
        raise UserError(f"{source.path}: the {len(files)} files hold no text{skipped}; give files with text in them")
    return found


def _index(file: Input, source: SourceConfig, bad: BadRecordPolicy, spool: Spool) -> Shard:
    file = seekable(file, spool)
    places, keys = [], []
    for found in format_of(file).scan(file, source, bad, WHOLE):
        places.append(found.place)
        keys.append(document_key(found.document))
    return Shard(file, source, np.array(places, dtype=np.int64).reshape(-1, 2), np.array(keys, dtype=np.uint64))
