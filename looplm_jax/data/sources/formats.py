"""What a file format must be able to do."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from looplm_jax.config import SourceConfig
from looplm_jax.data.documents import Document
from looplm_jax.data.sources.bad_records import BadRecordPolicy


@dataclasses.dataclass(frozen=True)
class Span:
    """Part of a file: bytes, row groups or records `start..end`, whichever the format counts."""

    start: int
    end: int


WHOLE = Span(0, 2**63 - 1)


@dataclasses.dataclass(frozen=True)
class Found:
    """A document, and the two numbers by which its format finds it again."""

    place: tuple[int, int]
    document: Document


class Format(Protocol):
    """One way to keep documents in a file."""

    def spans(self, file: Any, unit_bytes: int) -> tuple[Span, ...]:
        """Where the file can be cut; together they are the file. A pure function of file and size."""

    def scan(self, file: Any, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[Found]:
        """The documents that begin in a span, in order, in one pass. Empty texts are none."""

    def read(self, file: Any, source: SourceConfig, place: tuple[int, int]) -> Document:
        """One document that `scan` found."""


def ranges(total: int, step: int) -> tuple[Span, ...]:
    """`0..total` cut every `step`; one span where there is nothing to cut."""
    starts = range(0, max(total, 1), max(step, 1))
    return tuple(Span(start, min(start + starts.step, total)) for start in starts)
