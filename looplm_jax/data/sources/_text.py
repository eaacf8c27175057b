"""Plain text files: prose is split at blank lines into documents, code is kept whole.

Splitting makes it possible to shuffle a single book and to hold out a part of it.
"""

import codecs
import re
from collections.abc import Iterator

from looplm_jax.config import SourceConfig
from looplm_jax.data._documents import Document
from looplm_jax.data.sources._files import DataFile
from looplm_jax.data.sources._formats import (
    WHOLE,
    BadRecordPolicy,
    FoundDocument,
    Span,
    check_encoding,
    decode,
    ranges,
    too_long,
)
from looplm_jax.data.sources._spool import seekable

_PROSE = (".md", ".rst", ".txt")
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_DOCUMENT_BYTES = range(1024, 8192)  # bounds of the minimum length of a document, which grows with the file
_DOCUMENTS = 256  # per file, enough for a validation split; large files have more, small ones fewer
_LONGEST_PARAGRAPH = 65536

# A long file is first divided into sections, each of which can be read without the others.
_SECTION_BYTES = 2**24
# In order of preference: after blank lines, after a line, after a word, before the first byte of a character.
_ENDS_OF_SECTIONS = (_BLANK_LINES, re.compile(rb"\n"), re.compile(rb" "), re.compile(rb"(?=[\x00-\x7f\xc0-\xff])"))


class Text:
    """The plain text format. The documents of a file together are the whole file; an empty file has none."""

    def spans(self, file: DataFile, unit_bytes: int) -> tuple[Span, ...]:
        """Returns ranges of bytes in which sections of prose begin.

        A compressed file, or a file of code, is a single span.
        """
        if file.compression or file.suffix not in _PROSE:
            return (WHOLE,)
        return ranges(file.size, max(unit_bytes // _SECTION_BYTES, 1) * _SECTION_BYTES)

    def scan(self, file: DataFile, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[FoundDocument]:
        """Yields the documents of the sections that begin in a range of bytes.

        A section that is not UTF-8 is a bad record as a whole.
        """
        # Documents are read again by their offsets, which a compressed file does not have.
        file = seekable(file)
        size, limit = file.size, file.limits.record_bytes
        check_encoding(file.read(0, min(2, size)), file.name)

        for section in _sections(file, size, span):
            if file.suffix not in _PROSE and size > limit:
                bad.handle(lambda: file.name, too_long(limit))
                continue

            content = file.read(section.start, section.end)
            try:
                content.decode()
            except UnicodeDecodeError as error:
                place = section.start + error.start
                bad.handle(lambda: file.name, f"not UTF-8 at byte {place}")
                continue

            # The byte order mark is not part of the text.
            start = len(codecs.BOM_UTF8) if section.start == 0 and content.startswith(codecs.BOM_UTF8) else 0
            for end in _document_ends(content, size) if file.suffix in _PROSE else [len(content)]:
                if end > start:
                    yield FoundDocument((section.start + start, section.start + end), content[start:end].decode())
                start = max(start, end)

    def read(self, file: DataFile, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns the text of one document. Only that document is read."""
        return decode(file.read(*place), "document")


# Sections


def _sections(file: DataFile, size: int, span: Span) -> Iterator[Span]:
    """Yields the sections that begin in a span. Code has a single section."""
    if file.suffix not in _PROSE:
        yield Span(0, size)
        return
    for near in range(span.start, min(span.end, size), _SECTION_BYTES):
        yield Span(_section_start(file, size, near), _section_start(file, size, near + _SECTION_BYTES))


def _section_start(file: DataFile, size: int, near: int) -> int:
    """Returns the start of the section nearest after an offset.

    It is after the first blank lines; if there are none within a long paragraph, it is after a line, a word, or a
    character.
    """
    if near <= 0 or near >= size:
        return min(near, size)
    # The same bytes decide for the end of a section and for the start of the next, so that sections neither overlap nor
    # leave a gap, whichever worker reads them.
    window = file.read(near, min(near + _LONGEST_PARAGRAPH, size))
    found = filter(None, (pattern.search(window) for pattern in _ENDS_OF_SECTIONS))
    return near + next((match.end() for match in found), 0)


# Documents


def _document_ends(content: bytes, size: int) -> Iterator[int]:
    """Yields the ends of documents: the first possible split at which each is long enough for a file of this size."""
    # Large files have longer documents, so that the number of documents stays near _DOCUMENTS.
    least = min(max(size // _DOCUMENTS, _DOCUMENT_BYTES.start), _DOCUMENT_BYTES.stop)
    start = 0
    for end in _places_to_cut(content):
        if end - start >= least or end == len(content):
            yield end
            start = end


def _places_to_cut(content: bytes) -> Iterator[int]:
    """Yields possible splits: after blank lines, inside paragraphs that are far too long, and at the end."""
    start = 0
    for end in [*(match.end() for match in _BLANK_LINES.finditer(content)), len(content)]:
        if end - start > _LONGEST_PARAGRAPH:
            yield from _cuts_inside(content, start, end)
        if end > start:
            yield end
        start = end


def _cuts_inside(content: bytes, start: int, end: int) -> Iterator[int]:
    """Yields splits inside a paragraph, after a line or a word if possible, otherwise after a character."""
    while end - start > _DOCUMENT_BYTES.stop:
        limit = start + _DOCUMENT_BYTES.stop
        cut = 1 + max(content.rfind(space, start, limit) for space in (b"\n", b" "))
        while not cut and limit < end and content[limit] & 0xC0 == 0x80:  # in the middle of a character
            limit += 1
        start = cut or limit
        yield start
