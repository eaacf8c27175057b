"""The report of near-duplicates: dropped documents by source, sizes of clusters, and the largest clusters."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from looplm_jax.data.cleaning.markdown import table
from looplm_jax.data.cleaning.near_duplicates import Duplicates, NearDuplicates

_LARGEST = 20
_PLACES = 5
_SIZES = (2, 3, 5, 10, 100, 1000)


@dataclasses.dataclass(frozen=True)
class DocumentPlace:
    """The location of a document."""

    source: str
    place: str


@dataclasses.dataclass(frozen=True)
class Cluster:
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
    largest: tuple[Cluster, ...]

    @classmethod
    def of(
        cls, settings: NearDuplicates, duplicates: Duplicates, place: Callable[[int], DocumentPlace]
    ) -> "DuplicatesReport":
        """Returns the report, given a function that locates a document by number."""
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
                Cluster(place(kept).place, len(dropped), tuple(place(number).place for number in dropped[:_PLACES]))
                for kept, dropped in largest
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Returns the report as Markdown tables."""
        return "\n".join(
            (
                "## Near-duplicates",
                "",
                f"{self.dropped:,} of {self.documents:,} documents were dropped: like an earlier one, which was kept.",
                f"Like means that {self.settings.threshold:.0%} of the {self.settings.ngram}-grams of words are common",
                f"to both (Jaccard similarity, estimated with {self.settings.permutations} permutations).",
                "",
                table(("source", "dropped"), list(self.dropped_by_source.items())),
                table(("documents in a cluster, from", "clusters"), [(s.at_least, s.clusters) for s in self.sizes]),
                table(
                    ("kept", "dropped", "for example"),
                    [(cluster.kept, cluster.dropped, ", ".join(cluster.places)) for cluster in self.largest],
                ),
            )
        )


def _sizes(clusters: list[int]) -> tuple[ClusterSizes, ...]:
    """Returns the histogram of cluster sizes."""
    counts = Counter(max(size for size in _SIZES if size <= documents) for documents in clusters)
    return tuple(ClusterSizes(size, counts[size]) for size in _SIZES if counts[size])
