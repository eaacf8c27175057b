"""The report about a unit: its shards, the documents read, and the records left out."""

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
    """The outcome of a unit. The existence of its file means that the unit is done.

    Attributes:
      train: the shard of training sequences; empty if the unit has no training documents.
      validation: the shard of held-out sequences; empty if the unit has no held-out documents.
      sources: the documents read from each source.
      left_out: the records left out, by reason.
      findings: the findings of decontamination as JSON; empty if it was not requested.
    """

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    sources: tuple[SourceCount, ...]
    left_out: LeftOut
    findings: str


def report_name(number: int) -> str:
    """Returns the name of a unit's report file."""
    return f"units/{number:05d}.json"


def read_report(folder: PreparedFolder, number: int) -> UnitReport:
    """Reads the report of a finished unit."""
    return from_dict(UnitReport, json.loads(folder.read(report_name(number))))


class Tally:
    """Counts of a unit while its documents are processed, which also reports progress about twice a second."""

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
        """Counts a document that was read."""
        size = len(plain_text(placed.document).encode())
        self._documents[placed.source] += 1
        self._bytes[placed.source] += size
        self._news = Progress(self._news.documents + 1, self._news.tokens, self._news.bytes + size)
        if time.monotonic() - self._said > _SECONDS_BETWEEN_REPORTS:
            self.say()

    def compared(self, placed: Placed, overlap: Overlap | None) -> None:
        """Counts a document that was compared with the evaluation items."""
        self.findings.add(placed.source, f"{placed.file}:{placed.place[0]}:{placed.place[1]}", overlap)

    def tokenized(self, tokens: int, pieces: int, length: int, *, held_out: bool) -> None:
        """Counts a document that was kept.

        Args:
          tokens: the number of its tokens, without the first.
          pieces: the number of its segments that have a target.
          length: the number of positions in a sequence.
          held_out: whether the document is held out.
        """
        # Without dropping, the document would have this many segments.
        total = math.ceil(tokens / length)
        self.pieces += total
        self.pieces_without_target += total - pieces
        self._news = dataclasses.replace(self._news, tokens=self._news.tokens + tokens)
        if held_out:
            self.held_out += 1
        else:
            self.train_documents += 1

    def say(self) -> None:
        """Reports the progress since the previous report."""
        self._say(self._news)
        self._said, self._news = time.monotonic(), Progress(0, 0, 0)

    def sources(self) -> tuple[SourceCount, ...]:
        """Returns the counts of each source, in the order in which they were first read."""
        return tuple(
            SourceCount(path=path, documents=count, bytes=self._bytes[path]) for path, count in self._documents.items()
        )

    def left_out(self) -> LeftOut:
        """Returns the numbers of records left out, by reason."""
        return LeftOut(
            bad_records=self.bad.skipped,
            first_bad_record=self.bad.first,
            overlapping=self.findings.dropped.total(),
            near_duplicates=self.near_duplicates,
            pieces_without_target=self.pieces_without_target,
            pieces=self.pieces,
        )
