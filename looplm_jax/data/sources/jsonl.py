"""JSON lines: one document a line, found again by its byte offsets."""

from collections.abc import Iterator
from typing import IO

from looplm_jax.config import SourceConfig
from looplm_jax.data.documents import Document
from looplm_jax.data.sources.bad_records import BadRecord, BadRecordPolicy
from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.formats import WHOLE, Found, Span, ranges
from looplm_jax.data.sources.records import check_encoding, load_json, record_document, too_long

_BLOCK = 2**20


class JsonLines:
    """A line belongs to the span in which it begins. Blank lines are no documents."""

    def spans(self, file: DataFile, unit_bytes: int) -> tuple[Span, ...]:
        """Ranges of bytes; a compressed file is one."""
        return (WHOLE,) if file.compression else ranges(file.size, unit_bytes)

    def scan(self, file: DataFile, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[Found]:
        """The documents of the lines that begin in a range of bytes."""
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
                    bad.handle(lambda start=start: f"{file.name}:{_line_number(file, start)}", problem)  # type: ignore[misc]
                    continue
                if document:
                    yield Found((start, start + len(line)), document)

    def read(self, file: DataFile, source: SourceConfig, place: tuple[int, int]) -> Document:
        """The document of one line; nothing else of the file is read."""
        return record_document(load_json(file.read(*place)), source)


def _lines(stream: IO[bytes], span: Span, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yields the lines that begin in the span, each with its place. Of one that is too long, only the beginning."""
    place = span.start
    if place:  # the line that contains this byte belongs to the span before
        stream.seek(place - 1)
        place += _skip_line(stream) - 1
    while place < span.end and (line := stream.readline(limit + 1)):
        yield place, line
        place += len(line)
        if not line.endswith(b"\n"):
            place += _skip_line(stream)


def _skip_line(stream: IO[bytes]) -> int:
    """Returns how many bytes were left of the line, none of which are kept."""
    skipped = 0
    while piece := stream.readline(_BLOCK):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _line_number(file: DataFile, place: int) -> int:
    """The number, from 1, of the line that begins at a byte; only errors need it, so nothing counts before."""
    number, left = 1, place
    with file.open() as stream:
        while left and (block := stream.read(min(_BLOCK, left))):
            number += block.count(b"\n")
            left -= len(block)
    return number
