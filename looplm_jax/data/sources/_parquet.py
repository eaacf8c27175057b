"""Parquet files: one document per row, read by row groups."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from looplm_jax.config import SourceConfig
from looplm_jax.data._documents import Document
from looplm_jax.data.sources._files import DataFile
from looplm_jax.data.sources._formats import BadRecord, BadRecordPolicy, FoundDocument, Span, value_document
from looplm_jax.errors import UserError, suggest

# Random access within a row group is only possible once the group is decoded.
_ROW_GROUPS_IN_MEMORY = 8


class Parquet:
    """The Parquet format. A place is a row group and a row within it."""

    def spans(self, file: DataFile, unit_bytes: int) -> tuple[Span, ...]:
        """Returns ranges of row groups, each with as many as fill a unit before compression."""
        with file.open() as stream:
            metadata = _open(stream, file).metadata
            sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]

        # A span is closed when the next row group would exceed the unit; each has at least one row group.
        starts, filled = [0], 0
        for group, size in enumerate(sizes):
            if filled and filled + size > unit_bytes:
                starts.append(group)
                filled = 0
            filled += size

        return tuple(Span(start, end) for start, end in zip(starts, [*starts[1:], len(sizes)]))

    def scan(self, file: DataFile, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[FoundDocument]:
        """Yields the documents of a range of row groups, with one of them in memory at a time."""
        with file.open() as stream:
            table = _open_column(stream, file, source, span)
            for group in range(span.start, min(span.end, table.num_row_groups)):
                # The column is decoded as a whole; only the conversion to Python is per row.
                for row, value in enumerate(_column(file, table, source, group)):
                    try:
                        document = value_document(_as_python(value), source)
                    except BadRecord as problem:
                        bad.handle(lambda group=group, row=row: _where(file, table, group, row), problem)  # type: ignore[misc]
                        continue
                    if document:
                        yield FoundDocument((group, row), document)

    def read(self, file: DataFile, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns the document of one row. Its row group is read and cached."""
        group, row = place
        return value_document(_as_python(_row_group(file, file.version, source, group)[row]), source)


# Columns


@functools.lru_cache(maxsize=_ROW_GROUPS_IN_MEMORY)
def _row_group(file: DataFile, version: tuple[int, int], source: SourceConfig, group: int) -> Any:
    """Returns the source's column in one row group, cached.

    The version is part of the key, so changed files are reread.
    """
    with file.open() as stream:
        table = _open_column(stream, file, source, Span(group, group + 1))
        if group >= table.num_row_groups:
            raise IndexError(f"there are {table.num_row_groups} row groups")
        return _column(file, table, source, group)


def _column(file: DataFile, table: Any, source: SourceConfig, group: int) -> Any:
    """Reads the source's column in one row group. Raises UserError if it is too large or damaged."""
    import pyarrow

    # The size is checked before reading, because a small file can declare a huge column.
    size, limit = _column_bytes(table, source, group), file.limits.row_group_bytes
    if size > limit:
        raise UserError(
            f"{file.name}: column {source.key!r} of row group {group} takes {size:,} bytes, and "
            f"data.limits.row_group_bytes is {limit:,}; raise it, or write the file again in smaller row groups"
        )

    try:
        return table.read_row_group(group, columns=[source.key]).column(0)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        _raise_refusal(error)
        reason = " ".join(str(error).split())
        raise UserError(f"{file.name}: cannot be read as Parquet ({reason}); copy or make the file again") from None


def _as_python(value: Any) -> Any:
    """Converts an Arrow value. Raises BadRecord for text that is not UTF-8, which Arrow does not check."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start} of the text") from None


def _column_bytes(table: Any, source: SourceConfig, group: int) -> int:
    """Returns the decompressed size of the source's column in a row group, as declared by the file."""
    return sum(leaf.total_uncompressed_size for leaf in _leaves(table, source, group))


def _leaves(table: Any, source: SourceConfig, group: int) -> Iterator[Any]:
    """Yields the metadata of the column's leaves in a row group. A column of messages has several."""
    metadata = table.metadata.row_group(group)
    for number in range(metadata.num_columns):
        leaf = metadata.column(number)
        if leaf.path_in_schema.partition(".")[0] == source.key or leaf.path_in_schema == source.key:
            yield leaf


def _where(file: DataFile, table: Any, group: int, row: int) -> str:
    """Returns the location of a row for error messages, counted over the whole file."""
    # Users know rows of the file, not row groups.
    before = sum(table.metadata.row_group(earlier).num_rows for earlier in range(group))
    return f"{file.name}: row {before + row}"


# Opening


def _open_column(stream: Any, file: DataFile, source: SourceConfig, span: Span) -> Any:
    """Opens a file to read the source's column in a range of row groups.

    Raises UserError if there is no such column.
    """
    table = _open(stream, file)
    names = table.schema_arrow.names
    if source.key not in names:
        wanted = f"{source.key_setting}={source.key!r}"
        raise UserError(f"{file.name}: there is no column {wanted}{suggest(source.key, names)}")

    # Dictionary-encoded columns are opened as such, so that repeated values are not expanded in memory.
    groups = range(span.start, min(span.end, table.num_row_groups))
    repeated = {
        leaf.path_in_schema for group in groups for leaf in _leaves(table, source, group) if leaf.has_dictionary_page
    }
    return _open(stream, file, repeated, table.metadata) if repeated else table


def _open(stream: Any, file: DataFile, repeated: Iterable[str] = (), metadata: Any = None) -> Any:
    """Opens a file. Columns in `repeated` keep each distinct value in memory once."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(stream, read_dictionary=sorted(repeated), metadata=metadata)
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        _raise_refusal(error)
        raise UserError(
            f"{file.name}: not a Parquet file, or cut off; copy it again, or give it the ending of what it is"
        ) from None


def _raise_refusal(error: BaseException) -> None:
    """Re-raises an error of the file system. Arrow's own errors, for damaged files, have no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error
