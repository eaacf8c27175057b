"""The work on one unit: read, clean, tokenize, pack, and write."""

import dataclasses
import functools
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from looplm_jax.codec import from_dict
from looplm_jax.config import OnBadRecord
from looplm_jax.corpus._decontamination import EvaluationNgrams, Findings, Overlap
from looplm_jax.corpus._format import SHARD, CorpusSpec, LeftOut, PreparedFolder, Shard, SourceCount, as_json
from looplm_jax.corpus._shards import Segment, pieces, token_type, write_shard
from looplm_jax.corpus._work_units import LocatedDocument, Unit, documents
from looplm_jax.corpus._worker_pool import Progress, Report
from looplm_jax.data._documents import is_validation, plain_text
from looplm_jax.data._examples import to_example
from looplm_jax.data.sources import BadRecordPolicy
from looplm_jax.data.tokenizers import Tokenizer, deserialize

_SECONDS_BETWEEN_REPORTS = 0.5

# The same values as in `data/_packing.py`.
_OPEN_SEQUENCES = 64
_WINDOW_PIECES = 2**12
_WINDOW_TOKENS = 2**21


# Reports of units


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


class Counters:
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

    def read(self, placed: LocatedDocument) -> None:
        """Counts a document that was read."""
        # Bytes of text, whatever the compression of the file.
        size = len(plain_text(placed.document).encode())
        self._documents[placed.source] += 1
        self._bytes[placed.source] += size
        self._news = Progress(self._news.documents + 1, self._news.tokens, self._news.bytes + size)
        if time.monotonic() - self._said > _SECONDS_BETWEEN_REPORTS:
            self.say()

    def compared(self, placed: LocatedDocument, overlap: Overlap | None) -> None:
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


# Work


@dataclasses.dataclass(frozen=True)
class UnitJob:
    """A unit, and the numbers, from 0, of its documents to leave out as near-duplicates of earlier ones."""

    number: int
    unit: Unit
    duplicates: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeUnit:
    """A job that writes the packed sequences of a unit. It is sent to every worker once."""

    spec: CorpusSpec
    tokenizer_content: bytes
    url: str
    scratch: Path
    on_bad_record: OnBadRecord
    ngrams: EvaluationNgrams | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built in the process that uses it."""
        return deserialize(self.spec.tokenizer_kind, self.tokenizer_content)

    @functools.cached_property
    def parsed_sources(self) -> frozenset[str]:
        """The paths of sources in whose text names of special tokens are parsed."""
        return frozenset(source.path for source in self.spec.sources if source.special_tokens)

    def __call__(self, job: UnitJob, say: Report) -> UnitReport:
        """Writes the sequences of a unit, and then its report.

        Raises:
          UserError: there is a bad record, or the file system refuses.
        """
        folder = PreparedFolder(self.url)

        tally = Counters(BadRecordPolicy(self.on_bad_record), say)
        held_out: list[Segment] = []

        # Training segments are streamed to the shard; held-out ones are few and are collected on the way.
        train = self._write(folder, "train", job.number, self._train_pieces(job, tally, held_out))
        validation = self._write(folder, "validation", job.number, held_out)
        tally.say()

        report = UnitReport(
            train=tuple(dataclasses.replace(shard, documents=tally.train_documents) for shard in train),
            validation=tuple(dataclasses.replace(shard, documents=tally.held_out) for shard in validation),
            sources=tally.sources(),
            left_out=tally.left_out(),
            findings=json.dumps(tally.findings.to_json()) if self.ngrams is not None else "",
        )

        # The report is written last, because it marks the unit as done.
        folder.write(report_name(job.number), as_json(report))
        return report

    def _write(self, folder: PreparedFolder, part: str, number: int, segments: Iterable[Segment]) -> list[Shard]:
        """Packs segments and writes them as one shard. Returns it, or nothing if there are no segments."""
        length, tokens = self.spec.sequence_length, token_type(self.spec.vocab_size)
        # The seed is the number of the unit, so the order depends on nothing but the plan.
        rows = pack_segments(shuffled(segments, length, seed=number), length)
        shard = write_shard(rows, tokens, self.scratch, folder, f"{part}-{number:05d}{SHARD}")
        return [] if shard is None else [shard]

    def _train_pieces(self, job: UnitJob, tally: Counters, held_out: list[Segment]) -> Iterator[Segment]:
        """Yields the segments of kept training documents, and adds those of held-out documents to `held_out`."""
        for number, placed in enumerate(documents(job.unit, tally.bad)):
            tally.read(placed)

            if number in job.duplicates:
                tally.near_duplicates += 1
                continue

            if self.ngrams is not None:
                overlap = self.ngrams.overlap(plain_text(placed.document))
                tally.compared(placed, overlap)
                if overlap is not None:
                    continue

            example = to_example(placed.document, self.tokenizer, special=placed.source in self.parsed_sources)
            length = self.spec.sequence_length
            segments = pieces(example, length)

            # The split is by document, so all segments of a document are on the same side.
            is_held_out = is_validation(placed.document, self.spec.validation_fraction)
            tally.tokenized(len(example.tokens) - 1, len(segments), length, held_out=is_held_out)
            if is_held_out:
                held_out += segments
            else:
                yield from segments


# First-fit packing, in one pass and with bounded memory
#
# The algorithm is that of `data/_packing.py`: segments are shuffled within a window and then added to the first of 64
# open sequences that has room. It is implemented here because Grain's packer would import JAX in every worker. One
# difference: if no open sequence has room, only the fullest is closed, where Grain closes all.


def shuffled(pieces: Iterable[Segment], length: int, seed: int) -> Iterator[Segment]:
    """Yields the segments shuffled within a window, so that a long document does not fill consecutive sequences."""
    window = min(_WINDOW_PIECES, max(_WINDOW_TOKENS // length, _OPEN_SEQUENCES))
    random = np.random.default_rng(seed)
    stream = iter(pieces)
    while some := list(itertools.islice(stream, window)):
        yield from (some[place] for place in random.permutation(len(some)))


def pack_segments(pieces: Iterable[Segment], length: int) -> Iterator[list[Segment]]:
    """Yields sequences of at most `length` positions, as lists of segments.

    Every segment is in exactly one sequence. No segment may be longer than a sequence.
    """
    # Parallel lists of the open sequences and their free positions.
    rows: list[list[Segment]] = []
    room: list[int] = []

    for piece in pieces:
        place = next((row for row, left in enumerate(room) if left >= piece.positions), len(rows))

        if place == len(rows) == _OPEN_SEQUENCES:
            # The one that is least likely to take another segment.
            fullest = room.index(min(room))
            room.pop(fullest)
            yield rows.pop(fullest)
            place -= 1

        if place == len(rows):
            rows.append([])
            room.append(length)

        rows[place].append(piece)
        room[place] -= piece.positions

        if room[place] == 0:
            room.pop(place)
            yield rows.pop(place)

    # What is still open at the end of the unit. Units are independent, so their last sequences are not filled up.
    yield from rows
