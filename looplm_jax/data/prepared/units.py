"""The input cut into units of work: a pure function of the files, whatever the number of workers."""

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
_FILES_AT_ONCE = 16  # footers are read from far away


@dataclasses.dataclass(frozen=True)
class Part:
    """Documents that are read in one go: a file, or a span of one.

    Attributes:
      bytes: about how much of the file it is, which may be compressed.
    """

    file: Input
    source: SourceConfig
    span: Span
    bytes: int


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one worker does at a time: part of a large file, or several small ones."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """About how much of the files it is."""
        return sum(part.bytes for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A document, the source it comes from, and where a reader finds it."""

    source: str
    file: str
    place: tuple[int, int]
    document: Document


def find_all(sources: Iterable[SourceConfig], limits: ReadLimits | None = None) -> dict[SourceConfig, Inputs]:
    """Returns the files of every source. Raises UserError as `find_inputs` does."""
    return {source: find_inputs(source.path, source, limits) for source in sources}


def cut(
    sources: Iterable[SourceConfig], unit_bytes: int = UNIT_BYTES, found: Mapping[SourceConfig, Inputs] | None = None
) -> tuple[Unit, ...]:
    """Returns all files of the sources, or of what `find_all` found for them, as units of about `unit_bytes`."""
    found = found or find_all(sources)
    pairs = [(file, source) for source in sources for file in found[source]]
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        parts = threads.map(lambda pair: _parts(pair[0], pair[1], unit_bytes), pairs)
        return tuple(_together((part for file in parts for part in file), unit_bytes))


def documents(unit: Unit, bad: BadRecordPolicy) -> Iterator[Placed]:
    """The documents of a unit, in order, one pass. Raises UserError as `scan` does."""
    for part in unit.parts:
        for found in format_of(part.file).scan(part.file, part.source, bad, part.span):
            yield Placed(part.source.path, part.file.name, found.place, found.document)


def describe_inputs(units: Sequence[Unit]) -> str:
    """The files in a few words, with a digest of names, sizes and cuts: equal texts, equal work."""
    parts = [part for unit in units for part in unit.parts]
    cuts = [f"{part.file.name}\n{part.span.start}\n{part.span.end}\n{part.bytes}" for part in parts]
    digest = hashlib.blake2b(os.fsencode("\n".join(cuts)), digest_size=8).hexdigest()
    files, size = len({part.file.name for part in parts}), sum(unit.bytes for unit in units)
    return f"{files} files, {size} bytes, digest {digest}"


def digest_contents(units: Sequence[Unit]) -> str:
    """Returns a digest that changes when a file changes, also where its size does not.

    Local files are read whole. Of others, the store says which version it holds.
    """
    files = {part.file.name: part.file for unit in units for part in unit.parts}
    with concurrent.futures.ThreadPoolExecutor(_FILES_AT_ONCE) as threads:
        digests = threads.map(lambda file: file.digest(), files.values())
        return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def _parts(file: Input, source: SourceConfig, unit_bytes: int) -> list[Part]:
    found, size = spans(file, unit_bytes), file.size
    total = max(found[-1].end - found[0].start, 1) if found else 1
    return [Part(file, source, span, size * (span.end - span.start) // total) for span in found]


def _together(parts: Iterable[Part], unit_bytes: int) -> Iterator[Unit]:
    """Neighbours, as long as they are no more than a unit."""
    held: list[Part] = []
    for part in parts:
        if held and sum(other.bytes for other in held) + part.bytes > unit_bytes:
            yield Unit(tuple(held))
            held = []
        held.append(part)
    if held:
        yield Unit(tuple(held))
