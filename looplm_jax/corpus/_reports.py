"""Reports about the documents that cleaning dropped, as JSON and as Markdown."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from looplm_jax.corpus._decontamination import Findings, LocatedMatch
from looplm_jax.corpus._evaluation_texts import EvaluationFile
from looplm_jax.corpus._near_duplicates import Duplicates, NearDuplicates
from looplm_jax.terminal import markdown_table

_EXCERPT_CHARACTERS = 60

# Bounds on the length of the report.
_LARGEST = 20
_PLACES = 5
_SIZES = (2, 3, 5, 10, 100, 1000)


# Decontamination


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
    longest: tuple[LocatedMatch, ...]

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
                markdown_table(
                    ("evaluation file", "items", "too short", "found", "at least half", "whole"),
                    [(f.file, f.items, f.too_short, f.found, f.half, f.whole) for f in self.files],
                    right=(False, True, True, True, True, True),
                ),
                markdown_table(
                    ("source", "documents", "dropped"),
                    [(source.source, source.documents, source.dropped) for source in self.sources],
                    right=(False, True, True),
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
                _shortened(placed.match.excerpt, _EXCERPT_CHARACTERS),
            )
            for placed in self.longest
        ]

        columns = ("words", "of the item", "item", "document", "begins with")
        return ("Longest matches:", "", markdown_table(columns, rows, right=(True, False, False, False, False)))


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


# Near-duplicates


@dataclasses.dataclass(frozen=True)
class DocumentPlace:
    """The location of a document."""

    source: str
    place: str


@dataclasses.dataclass(frozen=True)
class DuplicateCluster:
    """A document that was kept, the number of documents dropped in its favor, and the first of their locations."""

    kept: str
    dropped: int
    places: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ClusterSizes:
    """The number of clusters with at least `at_least` documents, but fewer than the next size."""

    at_least: int
    clusters: int


@dataclasses.dataclass(frozen=True)
class DuplicatesReport:
    """The documents that were dropped because an earlier one is almost the same."""

    settings: NearDuplicates
    documents: int
    dropped: int
    dropped_by_source: dict[str, int]
    sizes: tuple[ClusterSizes, ...]
    largest: tuple[DuplicateCluster, ...]

    @classmethod
    def of(
        cls, settings: NearDuplicates, duplicates: Duplicates, place: Callable[[int], DocumentPlace]
    ) -> "DuplicatesReport":
        """Returns the report, given a function that locates a document by number."""
        # `kept` maps each dropped document to the one that was kept in its place.
        clusters: dict[int, list[int]] = {}
        for dropped, kept in sorted(duplicates.kept.items()):
            clusters.setdefault(kept, []).append(dropped)
        # Largest first; among equals, the earliest.
        largest = sorted(clusters.items(), key=lambda cluster: (-len(cluster[1]), cluster[0]))[:_LARGEST]

        return cls(
            settings=settings,
            documents=duplicates.documents,
            dropped=len(duplicates.kept),
            dropped_by_source=dict(sorted(Counter(place(number).source for number in duplicates.kept).items())),
            sizes=_sizes([1 + len(dropped) for dropped in clusters.values()]),
            largest=tuple(
                DuplicateCluster(
                    place(kept).place, len(dropped), tuple(place(number).place for number in dropped[:_PLACES])
                )
                for kept, dropped in largest
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Returns the report as Markdown tables."""
        # The settings are part of the report, because "near" depends on them.
        return "\n".join(
            (
                "## Near-duplicates",
                "",
                f"{self.dropped:,} of {self.documents:,} documents were dropped: like an earlier one, which was kept.",
                f"Like means that {self.settings.threshold:.0%} of the {self.settings.ngram}-grams of words are common",
                f"to both (Jaccard similarity, estimated with {self.settings.permutations} permutations).",
                "",
                markdown_table(("source", "dropped"), list(self.dropped_by_source.items()), right=(False, True)),
                markdown_table(
                    ("documents in a cluster, from", "clusters"),
                    [(size.at_least, size.clusters) for size in self.sizes],
                    right=(True, True),
                ),
                markdown_table(
                    ("kept", "dropped", "for example"),
                    [(cluster.kept, cluster.dropped, ", ".join(cluster.places)) for cluster in self.largest],
                    right=(False, True, False),
                ),
            )
        )


def _sizes(clusters: list[int]) -> tuple[ClusterSizes, ...]:
    """Returns the histogram of cluster sizes."""
    # A cluster counts for the largest bound that it reaches.
    counts = Counter(max(size for size in _SIZES if size <= documents) for documents in clusters)
    return tuple(ClusterSizes(size, counts[size]) for size in _SIZES if counts[size])


def _shortened(text: str, characters: int) -> str:
    """Returns the text on one line, shortened with an ellipsis if it is longer than `characters`."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
