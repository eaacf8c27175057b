"""The findings of decontamination: counts that are collected per unit and can be merged."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from looplm_jax.data.cleaning.ngrams import Match, Overlap

LONGEST = 20


@dataclasses.dataclass(frozen=True, order=True)
class PlacedMatch:
    """The longest run of words that a document shares with an item, and the location of the document."""

    source: str
    place: str
    match: Match


class Findings:
    """Counts for the report of decontamination. They do not depend on the order in which documents are added.

    Attributes:
      documents: the number of documents searched, by source.
      dropped: the number of documents dropped, by source.
      shares: for each item, by file and line, the largest fraction of it that any document contains.
      longest: the longest matches, at most `LONGEST`.
    """

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.shares: dict[tuple[str, int], float] = {}
        self.longest: list[PlacedMatch] = []

    def add(self, source: str, place: str, overlap: Overlap | None) -> None:
        """Counts a document of a source, which is dropped if it overlaps. `place` is its location for readers."""
        self.documents[source] += 1
        if overlap is None:
            return
        self.dropped[source] += 1
        self._found({(match.file, match.line): match.share for match in overlap.matches})
        self._keep_longest([PlacedMatch(source, place, overlap.matches[0])])

    def merge(self, other: "Findings") -> None:
        """Adds the counts of other documents."""
        self.documents.update(other.documents)
        self.dropped.update(other.dropped)
        self._found(other.shares)
        self._keep_longest(other.longest)

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as plain JSON values, sorted."""
        return {
            "documents": dict(sorted(self.documents.items())),
            "dropped": dict(sorted(self.dropped.items())),
            "items": [[file, line, share] for (file, line), share in sorted(self.shares.items())],
            "longest": [dataclasses.asdict(placed) for placed in self.longest],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Findings":
        """Returns findings from the values of `to_json`."""
        findings = cls()
        findings.documents.update(values["documents"])
        findings.dropped.update(values["dropped"])
        findings.shares = {(file, line): share for file, line, share in values["items"]}
        findings.longest = [
            PlacedMatch(placed["source"], placed["place"], Match(**placed["match"])) for placed in values["longest"]
        ]
        return findings

    def _found(self, shares: Mapping[tuple[str, int], float]) -> None:
        """Keeps the largest fraction of each item."""
        for item, share in shares.items():
            self.shares[item] = max(share, self.shares.get(item, 0.0))

    def _keep_longest(self, matches: list[PlacedMatch]) -> None:
        """Keeps the longest of the old and the new matches."""
        # Ties are broken by the match itself, so the result does not depend on the order of merging.
        everything = sorted(self.longest + matches, key=lambda placed: (-placed.match.words, placed))
        self.longest = everything[:LONGEST]
