"""What became of a unit: its shards, what was read, and what was left out."""

import dataclasses
import json
import math
import time
from collections import Counter

from looplm_jax.codec import from_dict
from looplm_jax.data.cleaning import Findings, Overlap
from looplm_jax.data.documents import plain_text
from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import LeftOut, Shard, SourceCount
from looplm_jax.data.prepared.pool import Progress, Report
from looplm_jax.data.prepared.units import Placed
from looplm_jax.data.sources import BadRecordPolicy

_SECONDS_BETWEEN_REPORTS = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitReport:
    """The file of this content says that a unit is done.

    Attributes:
      train: the rows to train on; none if the unit has no such documents.
      validation: the rows that are held out.
      sources: what was read.
      left_out: what was not kept.
      findings: of decontamination, as JSON; empty where nobody asked for it.
    """

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    sources: tuple[SourceCount, ...]
    left_out: LeftOut
    findings: str


def report_name(number: int) -> str:
    """The file of a unit's report."""
    return f"units/{number:05d}.json"


def read_report(folder: PreparedFolder, number: int) -> UnitReport:
    """The report of a unit that is done."""
    return from_dict(UnitReport, json.loads(folder.read(report_name(number))))


class Tally:
    """Counts of a unit as its documents go by; says now and then how far it is."""

    def __init__(self, bad: BadRecordPolicy, say: Report):
        self.bad = bad
        self.findings = Findings()
        self.train_documents = self.held_out = self.near_duplicates = self.pieces = self.pieces_without_target = 0
        self._documents: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._say = say
        self._said = time.monotonic()
        self._news = Progress(0, 0, 0)

    def read(self, placed: Placed) -> None:
        """A document was read."""
        size = len(plain_text(placed.document).encode())
        self._documents[placed.source] += 1
        self._bytes[placed.source] += size
        self._news = Progress(self._news.documents + 1, self._news.tokens, self._news.bytes + size)
        if time.monotonic() - self._said > _SECONDS_BETWEEN_REPORTS:
            self.say()

    def compared(self, placed: Placed, overlap: Overlap | None) -> None:
        """A document was looked through for items of evaluations."""
        self.findings.add(placed.source, f"{placed.file}:{placed.place[0]}:{placed.place[1]}", overlap)

    def tokenized(self, tokens: int, pieces: int, length: int, *, held_out: bool) -> None:
        """A document was kept: as many of its pieces of `length` tokens as have a target."""
        total = math.ceil(tokens / length)
        self.pieces += total
        self.pieces_without_target += total - pieces
        self._news = dataclasses.replace(self._news, tokens=self._news.tokens + tokens)
        if held_out:
            self.held_out += 1
        else:
            self.train_documents += 1

    def say(self) -> None:
        """Tell what was done since the last time."""
        self._say(self._news)
        self._said, self._news = time.monotonic(), Progress(0, 0, 0)

    def sources(self) -> tuple[SourceCount, ...]:
        """What was read, in the order in which it came."""
        return tuple(
            SourceCount(path=path, documents=count, bytes=self._bytes[path]) for path, count in self._documents.items()
        )

    def left_out(self) -> LeftOut:
        """What was not kept."""
        return LeftOut(
            bad_records=self.bad.skipped,
            first_bad_record=self.bad.first,
            overlapping=self.findings.dropped.total(),
            near_duplicates=self.near_duplicates,
            pieces_without_target=self.pieces_without_target,
            pieces=self.pieces,
        )
