"""Plain text: prose is cut at blank lines, so that a single book can be shuffled and split; code stays whole."""

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
    """Where documents end: at the first place to cut that makes them long enough."""
    least = min(max(len(content) // _DOCUMENTS, _DOCUMENT_BYTES.start), _DOCUMENT_BYTES.stop)
    start = 0
    for end in _places_to_cut(content):
        if end - start >= least or end == len(content):
            yield end
            start = end


def _places_to_cut(content: bytes) -> Iterator[int]:
    """After blank lines, within a paragraph that is far too long for one document, and at the end."""
    start = 0
    for end in [*(match.end() for match in _BLANK_LINES.finditer(content)), len(content)]:
        if end - start > _LONGEST_PARAGRAPH:
            yield from _cuts_inside(content, start, end)
        if end > start:
            yield end
        start = end


def _cuts_inside(content: bytes, start: int, end: int) -> Iterator[int]:
    """After a line or a word where there is one, else after a character."""
    while end - start > _DOCUMENT_BYTES.stop:
        limit = start + _DOCUMENT_BYTES.stop
        cut = 1 + max(content.rfind(space, start, limit) for space in (b"\n", b" "))
        while not cut and limit < end and content[limit] & 0xC0 == 0x80:  # in the middle of a character
            limit += 1
        start = cut or limit
        yield start
