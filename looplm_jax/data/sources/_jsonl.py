"""JSON Lines files: one document per line, located by its byte offsets."""

from collections.abc import Iterator
from typing import IO

from looplm_jax.config import SourceConfig
from looplm_jax.data._documents import Document
from looplm_jax.data.sources._files import DataFile
from looplm_jax.data.sources._formats import (
    WHOLE,
    BadRecord,
    BadRecordPolicy,
    FoundDocument,
    Span,
    check_encoding,
    load_json,
    ranges,
    record_document,
    too_long,
)

_BLOCK = 2**20  # bytes read at a time


class JsonLines:
    """The JSON Lines format. A line is read with the span in which it begins. Blank lines are skipped."""

    def spans(self, file: DataFile, unit_bytes: int) -> tuple[Span, ...]:
        """Returns ranges of bytes. A compressed file is a single span."""
        return (WHOLE,) if file.compression else ranges(file.size, unit_bytes)

    def scan(self, file: DataFile, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[FoundDocument]:
        """Yields the documents of the lines that begin in a range of bytes."""
        with file.open() as stream:
            limit = file.limits.record_bytes
            for start, line in _lines(stream, span, limit):
                if start == 0:
                    check_encoding(line[:2], file.name)

                try:
                    if len(line) > limit and not line.endswith(b"\n"):
                        raise too_long(limit)
                    document = record_document(load_json(line), source) if line.strip() else ""
                except BadRecord as problem:
                    # A function, because counting lines reads the file again, which only a message needs.
                    bad.handle(lambda start=start: f"{file.name}:{_line_number(file, start)}", problem)  # type: ignore[misc]
                    continue

                if document:
                    yield FoundDocument((start, start + len(line)), document)

    def read(self, file: DataFile, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns the document of one line. Only that line is read."""
        return record_document(load_json(file.read(*place)), source)


def _lines(stream: IO[bytes], span: Span, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that begin in a span, with their offsets.

    Of a line longer than `limit`, only the start is kept.
    """
    place = span.start
    if place:  # the line that contains this byte begins in the span before
        stream.seek(place - 1)
        place += _skip_line(stream) - 1

    # One byte more than the limit shows that a line exceeds it, without reading all of it.
    while place < span.end and (line := stream.readline(limit + 1)):
        yield place, line
        place += len(line)
        if not line.endswith(b"\n"):
            place += _skip_line(stream)


def _skip_line(stream: IO[bytes]) -> int:
    """Skips the rest of a line, without keeping it in memory. Returns the number of bytes skipped."""
    skipped = 0
    while piece := stream.readline(_BLOCK):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _line_number(file: DataFile, place: int) -> int:
    """Returns the number, from 1, of the line at an offset.

    Only errors need it, so lines are not counted while scanning.
    """
    number, left = 1, place
    with file.open() as stream:
        while left and (block := stream.read(min(_BLOCK, left))):
            number += block.count(b"\n")
            left -= len(block)
    return number
