"""The work on one unit: read, clean, tokenize, pack, and write."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from looplm_jax.config import OnBadRecord
from looplm_jax.data.cleaning import EvaluationNgrams
from looplm_jax.data.documents import plain_text
from looplm_jax.data.examples import to_example
from looplm_jax.data.prepared.folder import SHARD, PreparedFolder
from looplm_jax.data.prepared.manifest import Plan, Shard, as_json
from looplm_jax.data.prepared.packing import pack_rows, shuffled
from looplm_jax.data.prepared.pool import Report
from looplm_jax.data.prepared.row import Segment, pieces, token_type
from looplm_jax.data.prepared.shards import write_shard
from looplm_jax.data.prepared.unit_report import Tally, UnitReport, report_name
from looplm_jax.data.prepared.units import Unit, documents
from looplm_jax.data.sources import BadRecordPolicy
from looplm_jax.data.splits import is_validation
from looplm_jax.data.tokenizers import Tokenizer, deserialize


@dataclasses.dataclass(frozen=True)
class UnitJob:
    """A unit, and the numbers, from 0, of its documents to leave out as near-duplicates of earlier ones."""

    number: int
    unit: Unit
    duplicates: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeUnit:
    """A job that writes the packed sequences of a unit. It is sent to every worker once."""

    plan: Plan
    tokenizer_content: bytes
    url: str
    scratch: Path
    on_bad_record: OnBadRecord
    ngrams: EvaluationNgrams | None = None

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, built in the process that uses it."""
        return deserialize(self.plan.tokenizer_kind, self.tokenizer_content)

    @functools.cached_property
    def parsed_sources(self) -> frozenset[str]:
        """The paths of sources in whose text names of special tokens are parsed."""
        return frozenset(source.path for source in self.plan.sources if source.special_tokens)

    def __call__(self, job: UnitJob, say: Report) -> UnitReport:
        """Writes the sequences of a unit, and then its report.

        Raises:
          UserError: there is a bad record, or the file system refuses.
        """
        folder = PreparedFolder(self.url)

        tally = Tally(BadRecordPolicy(self.on_bad_record), say)
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
        length, tokens = self.plan.sequence_length, token_type(self.plan.vocab_size)
        rows = pack_rows(shuffled(segments, length, seed=number), length)
        shard = write_shard(rows, tokens, self.scratch, folder, f"{part}-{number:05d}{SHARD}")
        return [] if shard is None else [shard]

    def _train_pieces(self, job: UnitJob, tally: Tally, held_out: list[Segment]) -> Iterator[Segment]:
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
            length = self.plan.sequence_length
            segments = pieces(example, length)

            # The split is by document, so all segments of a document are on the same side.
            is_held_out = is_validation(placed.document, self.plan.validation_fraction)
            tally.tokenized(len(example.tokens) - 1, len(segments), length, held_out=is_held_out)
            if is_held_out:
                held_out += segments
            else:
                yield from segments
