"""The report of decontamination: by evaluation file, by source, and the longest matches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from looplm_jax.data.cleaning.evaluation_texts import EvaluationFile
from looplm_jax.data.cleaning.findings import Findings, PlacedMatch
from looplm_jax.data.cleaning.markdown import shown, table

_EXCERPT_CHARACTERS = 60


@dataclasses.dataclass(frozen=True)
class FoundItems:
    """The numbers of items of an evaluation file that occur in the data: in part, at least by half, and completely.

    An item occurs by half if half of the words searched for are in n-grams that occur in one document.
    """

    file: str
    items: int
    too_short: int
    found: int
    half: int
    whole: int


@dataclasses.dataclass(frozen=True)
class DroppedDocuments:
    """The number of documents of a source that were searched, and the number that were dropped."""

    source: str
    documents: int
    dropped: int


@dataclasses.dataclass(frozen=True)
class DecontaminationReport:
    """The matches of `n` consecutive words, and the documents that were dropped because of them."""

    n: int
    files: tuple[FoundItems, ...]
    sources: tuple[DroppedDocuments, ...]
    longest: tuple[PlacedMatch, ...]

    @classmethod
    def of(cls, n: int, files: Sequence[EvaluationFile], findings: Findings) -> "DecontaminationReport":
        """Returns the report of the findings for evaluation files (`EvaluationNgrams.files`)."""
        return cls(
            n=n,
            files=tuple(_found_items(file, findings) for file in files),
            sources=tuple(
                DroppedDocuments(source, count, findings.dropped[source])
                for source, count in sorted(findings.documents.items())
            ),
            longest=tuple(findings.longest),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Returns the report as Markdown tables."""
        return "\n".join(
            (
                "## Decontamination",
                "",
                f"Documents were dropped that have {self.n} words in a row in common with an item of an evaluation, or",
                "all words of a shorter item; items that are too short were not looked for.",
                "",
                table(
                    ("evaluation file", "items", "too short", "found", "at least half", "whole"),
                    [(f.file, f.items, f.too_short, f.found, f.half, f.whole) for f in self.files],
                ),
                table(
                    ("source", "documents", "dropped"),
                    [(source.source, source.documents, source.dropped) for source in self.sources],
                ),
                *self._longest(),
            )
        )

    def _longest(self) -> tuple[str, ...]:
        """Returns the lines about the longest matches."""
        if not self.longest:
            return ()

        rows = [
            (
                placed.match.words,
                f"{placed.match.share:.0%}",
                f"{placed.match.file}:{placed.match.line}",
                placed.place,
                shown(placed.match.excerpt, _EXCERPT_CHARACTERS),
            )
            for placed in self.longest
        ]

        return ("Longest matches:", "", table(("words", "of the item", "item", "document", "begins with"), rows))


def _found_items(file: EvaluationFile, findings: Findings) -> FoundItems:
    """Returns the numbers of found items for one evaluation file."""
    # One entry for each item that was found in any document.
    shares = [share for (name, _), share in findings.shares.items() if name == file.name]
    return FoundItems(
        file=file.name,
        items=file.items,
        too_short=file.too_short,
        found=len(shares),
        half=sum(share >= 0.5 for share in shares),
        whole=sum(share == 1.0 for share in shares),
    )
