"""Near-duplicates in a whole corpus: workers compute signatures unit by unit, then all documents are compared."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from looplm_jax.config import OnBadRecord
from looplm_jax.corpus._format import SIGNATURES, PreparedFolder
from looplm_jax.corpus._near_duplicates import Duplicates, NearDuplicates
from looplm_jax.corpus._reports import DocumentPlace, DuplicatesReport
from looplm_jax.corpus._work_units import documents
from looplm_jax.corpus._worker import Counters, UnitJob
from looplm_jax.corpus._worker_pool import Report
from looplm_jax.data._documents import plain_text
from looplm_jax.data.sources import BadRecordPolicy

# Signatures of a unit


@dataclasses.dataclass(frozen=True)
class SignUnit:
    """A job that writes the MinHash signatures of a unit's documents."""

    url: str
    settings: NearDuplicates
    on_bad_record: OnBadRecord

    def __call__(self, job: UnitJob, say: Report) -> None:
        """Writes the signature file of a unit, which `leave_out` reads.

        Raises UserError for the same reasons as reading.
        """
        tally = Counters(BadRecordPolicy(self.on_bad_record), say)
        # Each pair of source and file is stored once, and documents refer to it by number.
        names: dict[tuple[str, str], int] = {}
        places: list[tuple[int, int, int]] = []
        # The empty array determines the shape if the unit has no documents.
        signatures = [np.zeros((0, self.settings.permutations), np.uint32)]

        for placed in documents(job.unit, tally.bad):
            tally.read(placed)
            signatures.append(self.settings.signature(plain_text(placed.document))[None])
            places.append((names.setdefault((placed.source, placed.file), len(names)), *placed.place))

        tally.say()
        # Written in one piece, so that a file is either missing or complete.
        content = io.BytesIO()
        np.savez(
            content,
            signatures=np.concatenate(signatures),
            places=np.array(places, np.int64).reshape(-1, 3),
            names=np.array(list(names), str).reshape(-1, 2),
        )
        PreparedFolder(self.url).write(signatures_name(job.number), content.getvalue())


# Comparison of all documents


@dataclasses.dataclass(frozen=True)
class DroppedByUnit:
    """The documents to leave out of each unit, and the report about them."""

    of_unit: tuple[frozenset[int], ...]
    report: DuplicatesReport


def signatures_name(number: int) -> str:
    """Returns the name of a unit's signature file."""
    return f"{SIGNATURES}/{number:05d}.npz"


def leave_out(folder: PreparedFolder, units: int, settings: NearDuplicates, scratch: Path) -> DroppedByUnit:
    """Compares the documents of all units, in order. Signatures are kept in a memory-mapped file, not in memory."""
    # `numbers[i]` is the number of the first document of unit i.
    numbers = [0]
    file = scratch / "signatures"
    with file.open("wb") as stream:
        for unit in range(units):
            signatures = _read(folder, unit)["signatures"]
            # Unit after unit, so that the memory is that of one unit.
            stream.write(signatures.tobytes())
            numbers.append(numbers[-1] + len(signatures))

    shape = (numbers[-1], settings.permutations)
    # A file of length 0 cannot be mapped.
    together = np.memmap(file, np.uint32, "r", shape=shape) if numbers[-1] else np.zeros(shape, np.uint32)
    duplicates = settings.drop(together)
    report = DuplicatesReport.of(settings, duplicates, _Places(folder, numbers).place)
    return DroppedByUnit(_by_unit(duplicates, numbers), report)


def _by_unit(duplicates: Duplicates, numbers: Sequence[int]) -> tuple[frozenset[int], ...]:
    """Returns the dropped documents of each unit, as numbers within the unit."""
    dropped = np.sort(np.fromiter(duplicates.dropped, np.int64, len(duplicates.dropped)))
    # Both are sorted, so a unit's documents are a contiguous range.
    edges = np.searchsorted(dropped, numbers)
    units = zip(edges, edges[1:], numbers)
    return tuple(frozenset((dropped[start:end] - first).tolist()) for start, end, first in units)


class _Places:
    """The location of documents, by number. The files of units are cached once read."""

    def __init__(self, folder: PreparedFolder, numbers: Sequence[int]):
        self._folder, self._numbers = folder, numbers
        self._units: dict[int, list[DocumentPlace]] = {}

    def place(self, number: int) -> DocumentPlace:
        """Returns the source, the file and the position of a document."""
        # `right`, because an index equal to a start belongs to that unit.
        unit = int(np.searchsorted(self._numbers, number, side="right")) - 1
        if unit not in self._units:
            self._units[unit] = _document_places(_read(self._folder, unit))
        return self._units[unit][number - self._numbers[unit]]


def _document_places(unit: "dict[str, np.ndarray]") -> list[DocumentPlace]:
    """Returns the locations of a unit's documents."""
    names = unit["names"].tolist()
    return [
        DocumentPlace(names[name][0], f"{names[name][1]}:{first}:{second}")
        for name, first, second in unit["places"].tolist()
    ]


def _read(folder: PreparedFolder, unit: int) -> "dict[str, np.ndarray]":
    """Reads the signature file of a unit."""
    with np.load(io.BytesIO(folder.read(signatures_name(unit)))) as arrays:
        return dict(arrays)
