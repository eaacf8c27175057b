"""Plain text: prose is cut at blank lines into documents, so that a single book can be shuffled and split; code is one."""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.records import BadRecordPolicy, as_keys
from looplm_jax.data.splits import document_key

_PROSE = (".md", ".rst", ".txt")
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_DOCUMENT_BYTES = range(1024, 8192)
_DOCUMENTS = 256  # enough for a validation split; a longer file has more of them, a shorter one fewer
_LONGEST_PARAGRAPH = 65536


@dataclasses.dataclass(frozen=True, eq=False)
class TextShard:
    """The documents of a file, which together are the file: document i is the bytes `starts[i]..ends[i]`."""

    file: DataFile
    starts: Int64[np.ndarray, "N"]
    ends: Int64[np.ndarray, "N"]
    keys: UInt64[np.ndarray, "N"]

    def read(self, index: int) -> str:
        """The text of one document; nothing else of the file is read."""
        return self.file.read(int(self.starts[index]), int(self.ends[index])).decode()


def index_text(file: DataFile, bad: BadRecordPolicy) -> TextShard:
    """Read the file once, check that it is UTF-8, and note where its documents are. An empty file has none."""
    content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        bad.handle(file.name, f"not UTF-8 at byte {error.start}")
        content = b""
    ends = list(_document_ends(content)) if file.suffix in _PROSE else [len(content)] * bool(content)
    starts = [0, *ends][: len(ends)]
    keys = [document_key(content[start:end].decode()) for start, end in zip(starts, ends)]
    return TextShard(file, np.array(starts, np.int64), np.array(ends, np.int64), as_keys(keys))


def _document_ends(content: bytes) -> Iterator[int]:
    """Where documents end: after blank lines, or within a paragraph that is far too long for one document."""
    least = min(max(len(content) // _DOCUMENTS, _DOCUMENT_BYTES.start), _DOCUMENT_BYTES.stop)
    start = paragraph = 0
    for end in _paragraph_ends(content):
        for cut in _cuts_inside(content, paragraph, end) if end - paragraph > _LONGEST_PARAGRAPH else (end,):
            if cut - start >= least or cut == len(content):
                yield cut
                start = cut
        paragraph = end


def _paragraph_ends(content: bytes) -> Iterator[int]:
    yield from (match.end() for match in _BLANK_LINES.finditer(content) if match.end() < len(content))
    if content:
        yield len(content)


def _cuts_inside(content: bytes, start: int, end: int) -> Iterator[int]:
    """Cuts after a line or a word where there is one, else after a character; the last is `end`."""
    while end - start > _DOCUMENT_BYTES.stop:
        limit = start + _DOCUMENT_BYTES.stop
        cut = 1 + max(content.rfind(space, start, limit) for space in (b"\n", b" "))
        while not cut and limit < end and content[limit] & 0xC0 == 0x80:  # inside a character
            limit += 1
        start = cut or limit
        yield start
    yield end
