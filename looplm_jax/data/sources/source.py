"""All documents of a set of files, by index."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt64

from looplm_jax.config import OnBadRecord
from looplm_jax.data.sources.files import DataFile, find_files
from looplm_jax.data.sources.jsonl import index_jsonl
from looplm_jax.data.sources.parquet import index_parquet
from looplm_jax.data.sources.records import BadRecordPolicy, Shard
from looplm_jax.data.sources.text import index_text
from looplm_jax.errors import UserError


class FileSource:
    """The documents of many files, in the order of the files' names."""

    def __init__(self, pattern: str, shards: Sequence[Shard], skipped: int):
        self._pattern = pattern
        self._shards = tuple(shards)
        self._ends = np.cumsum([len(shard.keys) for shard in shards])
        self.skipped = skipped

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> str:
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


def open_files(pattern: str, *, text_key: str = "text", on_bad_record: OnBadRecord = OnBadRecord.STOP) -> FileSource:
    """Index the documents of a path, glob, folder or fsspec URL. Every file is read once; texts are not kept.

    Raises:
      UserError: nothing matches, a file cannot be read or holds a bad record (file and line named), or no text at all.
    """
    files, bad = find_files(pattern), BadRecordPolicy(on_bad_record)
    source = FileSource(pattern, [_index(file, text_key, bad) for file in files], bad.skipped)
    if len(source) == 0:
        skipped = f" ({bad.skipped} bad records were left out)" if bad.skipped else ""
        raise UserError(f"{pattern}: the {len(files)} files hold no text{skipped}; give files with text in them")
    return source


def _index(file: DataFile, text_key: str, bad: BadRecordPolicy) -> Shard:
    if file.suffix == ".jsonl":
        return index_jsonl(file, text_key, bad)
    if file.suffix == ".parquet":
        return index_parquet(file, text_key, bad)
    return index_text(file, bad)
