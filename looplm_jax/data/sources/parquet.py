"""Parquet: one document a row, read by row groups."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.records import BadRecord, BadRecordPolicy, as_keys, checked_text
from looplm_jax.data.splits import document_key
from looplm_jax.errors import UserError, suggest

_ROW_GROUPS_IN_MEMORY = 8


@dataclasses.dataclass(frozen=True, eq=False)
class ParquetShard:
    """The documents of a .parquet file: document i is row `rows[i]` of row group `groups[i]`."""

    file: DataFile
    column: str
    groups: Int64[np.ndarray, "N"]
    rows: Int64[np.ndarray, "N"]
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> str:
        """The text of one row. Its row group is read, and kept for a while."""
        return _row_group(self, int(self.groups[index]))[int(self.rows[index])].as_py()


def index_parquet(file: DataFile, column: str, bad: BadRecordPolicy) -> ParquetShard:
    """Read the column once, check every row, and note where the documents are. Empty texts are none."""
    places, keys, first_row = [], [], 0
    with file.open() as stream:
        table = _open(stream, file, column)
        for group in range(table.num_row_groups):
            values = table.read_row_group(group, columns=[column]).column(0)
            for row, value in enumerate(values):
                try:
                    text = checked_text(value.as_py())
                except BadRecord as problem:
                    bad.handle(f"{file.name}: row {first_row + row}", problem)
                    continue
                if text:
                    places.append((group, row))
                    keys.append(document_key(text))
            first_row += len(values)
    groups, rows = np.array(places, dtype=np.int64).reshape(-1, 2).T
    return ParquetShard(file, column, groups, rows, as_keys(keys))


@functools.lru_cache(maxsize=_ROW_GROUPS_IN_MEMORY)
def _row_group(shard: ParquetShard, group: int) -> Any:
    with shard.file.open() as stream:
        return _open(stream, shard.file, shard.column).read_row_group(group, columns=[shard.column]).column(0)


def _open(stream: Any, file: DataFile, column: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
    except pyarrow.ArrowInvalid:
        raise UserError(f"{file.name}: not a Parquet file; give it the ending of what it is, or remove it") from None
    names = table.schema_arrow.names
    if column not in names:
        raise UserError(f"{file.name}: there is no column {column!r}{suggest(column, names)}; set text_key to one")
    return table
