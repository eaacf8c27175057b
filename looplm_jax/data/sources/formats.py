"""The interface of all file formats."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

from looplm_jax.config import SourceConfig
from looplm_jax.data.documents import Document
from looplm_jax.data.sources.bad_records import BadRecordPolicy


@dataclasses.dataclass(frozen=True)
class Span:
    """A range `start..end` of a file, in the unit of its format: bytes, row groups, rows or records."""

    start: int
    end: int


WHOLE = Span(0, 2**63 - 1)


@dataclasses.dataclass(frozen=True)
class Found:
    """A document, and the two numbers with which its format can read it again."""

    place: tuple[int, int]
    document: Document


class Format(Protocol):
    """A way to store documents in a file."""

    def spans(self, file: Any, unit_bytes: int) -> tuple[Span, ...]:
        """Returns spans that divide the file and together cover it. A pure function of the file and the unit size."""

    def scan(self, file: Any, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[Found]:
        """Yields the documents that begin in a span, in order, in one pass. Empty texts are skipped."""

    def read(self, file: Any, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns one document at a place that `scan` found."""


def ranges(total: int, step: int) -> tuple[Span, ...]:
    """Divides `0..total` into spans of `step`. Returns one span if there is nothing to divide."""
    starts = range(0, max(total, 1), max(step, 1))
    return tuple(Span(start, min(start + starts.step, total)) for start in starts)
