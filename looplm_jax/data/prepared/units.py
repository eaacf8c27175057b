"""Division of the input into units of work: a pure function of the files, independent of the number of workers."""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from looplm_jax.config import ReadLimits, SourceConfig
from looplm_jax.data.documents import Document
from looplm_jax.data.sources import BadRecordPolicy, Input, Inputs, Span, find_inputs, spans
from looplm_jax.data.sources.by_name import format_of

UNIT_BYTES = 64 * 2**20
_FILES_AT_ONCE = 16  # reading footers of remote files is dominated by latency


# Units


@dataclasses.dataclass(frozen=True)
class Part:
    """Documents that are read in one pass: a file, or a span of one.

    Attributes:
      file: the file.
      source: the source of the file.
      span: the span to read.
      bytes: the approximate size of the span, in the file's own, possibly compressed, bytes.
    """

    file: Input
    source: SourceConfig
    span: Span
    bytes: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """The work of one job: a span of a large file, or several small files."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """The approximate size of the unit, in bytes of its files."""
        return sum(part.bytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A document, its source, its file, and its position in the file."""

    source: str
    file: str
    place: tuple[int, int]
    document: Document


def find_all(sources: Iterable[SourceConfig], limits: ReadLimits | None = None) -> dict[SourceConfig, Inputs]:
    """Returns the files of every source. Raises UserError for the same reasons as `find_inputs`."""
    return {source: find_inputs(source.path, source, limits) for source in sources}


def cut(
    sources: Iterable[SourceConfig], unit_bytes: int = UNIT_BYTES, found: Mapping[SourceConfig, Inputs] | None = None
) -> tuple[Unit, ...]:
    """Divides all files of the sources into units of about `unit_bytes`.

    Args:
      sources: the sources, in order.
      unit_bytes: the approximate size of a unit.
      found: the result of `find_all`, if it was called before.
    """
    found = found or find_all(sources)
    pairs = [(file, source) for source in sources for file in found[source]]

    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        parts = threads.map(lambda pair: _parts(pair[0], pair[1], unit_bytes), pairs)
        return tuple(_together((part for file in parts for part in file), unit_bytes))


def documents(unit: Unit, bad: BadRecordPolicy) -> Iterator[Placed]:
    """Yields the documents of a unit, in order, in one pass. Raises UserError for the same reasons as `scan`."""
    for part in unit.parts:
        for found in format_of(part.file).scan(part.file, part.source, bad, part.span):
            yield Placed(part.source.path, part.file.name, found.place, found.document)


# Description of the input


def describe_inputs(units: Sequence[Unit]) -> str:
    """Returns a short description of the files, with a digest of names, sizes and spans.

    Equal texts mean equal work.
    """
    parts = [part for unit in units for part in unit.parts]
    cuts = [f"{part.file.name}\n{part.span.start}\n{part.span.end}\n{part.bytes}" for part in parts]
    digest = hashlib.blake2b(os.fsencode("\n".join(cuts)), digest_size=8).hexdigest()
    files, size = len({part.file.name for part in parts}), sum(unit.bytes for unit in units)
    return f"{files} files, {size} bytes, digest {digest}"


def digest_contents(units: Sequence[Unit]) -> str:
    """Returns a digest that changes when any file changes, even if its size stays the same.

    Local files are read completely. For others, the version that the store reports is used.
    """
    files = {part.file.name: part.file for unit in units for part in unit.parts}
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        digests = threads.map(lambda file: file.digest(), files.values())
        return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def _parts(file: Input, source: SourceConfig, unit_bytes: int) -> list[Part]:
    """Returns the spans of a file. Its bytes are attributed in proportion to the length of each span."""
    found, size = spans(file, unit_bytes), file.size
    total = max(found[-1].end - found[0].start, 1) if found else 1
    return [Part(file, source, span, size * (span.end - span.start) // total) for span in found]


def _together(parts: Iterable[Part], unit_bytes: int) -> Iterator[Unit]:
    """Groups consecutive parts into units of at most `unit_bytes`, or of a single part."""
    held: list[Part] = []
    for part in parts:
        if held and sum(other.bytes for other in held) + part.bytes > unit_bytes:
            yield Unit(tuple(held))
            held = []
        held.append(part)
    if held:
        yield Unit(tuple(held))
