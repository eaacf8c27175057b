"""Decontamination: finds evaluation items in a text by the runs of words that both have in common."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from looplm_jax.corpus._evaluation_texts import (
    EvaluationFile,
    EvaluationTexts,
    TextsBuilder,
    evaluation_files,
    read_items,
)
from looplm_jax.corpus._words import words
from looplm_jax.errors import UserError

_SPARSENESS = 16  # flags per run: at most 1 in 16 is set, so at least 15 of 16 windows of unrelated text need no search
_SEED = 0

NGRAM = 13
# Enough to recognize the text in a report.
_EXCERPT_WORDS = 30

LONGEST = 20


# A hash table of n-grams, with lookups for all positions of a document at once


@dataclasses.dataclass(frozen=True, eq=False)
class NgramTable:
    """The positions in `words` of evaluation texts at which runs of `length` words begin, grouped by equal runs.

    Runs are identified by 64-bit hashes: with 10^6 runs, the probability of any false match in 10^12 words is 1 in 18.

    Attributes:
      length: the number of words in a run.
      hashes: the hashes of the distinct runs, sorted.
      places: the positions of all runs, grouped by run.
      first_places: the positions of run i are `places[first_places[i]:first_places[i + 1]]`.
      flags: a table indexed by the low bits of a hash; false means that no run has these bits.
    """

    length: int
    hashes: UInt64[np.ndarray, "runs"]
    places: Int64[np.ndarray, "places"]
    first_places: Int64[np.ndarray, "runs_and_end"]
    flags: Bool[np.ndarray, "flags"]

    @classmethod
    def of(cls, length: int, hashes: UInt64[np.ndarray, "places"], places: Int64[np.ndarray, "places"]) -> "NgramTable":
        """Returns the table of runs with these hashes at these positions."""
        # Stable, so that the positions of equal runs stay sorted.
        order = np.argsort(hashes, kind="stable")
        unique, first = np.unique(hashes[order], return_index=True)

        # The number of flags is a power of two, so that `_slots` is a bit mask.
        flags = np.zeros(1 << int(len(unique) * _SPARSENESS - 1).bit_length(), bool)
        flags[_slots(unique, len(flags))] = True

        return cls(length, unique, places[order], np.append(first, len(places)), flags)

    def find(self, hashes: UInt64[np.ndarray, "windows"]) -> Int64[np.ndarray, "found"]:
        """Returns the sorted positions of all runs whose hash is among those of a document's windows."""
        likely = np.unique(hashes[self.flags[_slots(hashes, len(self.flags))]])

        # The flags have false positives, so hashes are compared exactly. The index is clipped for hashes after the
        # last.
        runs = np.searchsorted(self.hashes, likely)
        runs = runs[self.hashes[np.minimum(runs, len(self.hashes) - 1)] == likely]

        # A run may occur in several items, for example in two copies of a question.
        ranges = [self.places[self.first_places[run] : self.first_places[run + 1]] for run in runs]
        return np.sort(np.concatenate([self.places[:0], *ranges]))


def word_values(count: int) -> UInt64[np.ndarray, "words"]:
    """Returns a pseudorandom number for each of `count` words. The numbers are always the same."""
    return _random(_SEED, count)


def window_hashes(
    values: UInt64[np.ndarray, "words"], lengths: tuple[int, ...]
) -> dict[int, UInt64[np.ndarray, "windows"]]:
    """Returns, for each length, the hash of every run of that many words.

    The hash is a sum of products modulo 2^64 (multilinear hashing).
    """
    found: dict[int, np.ndarray] = {}
    multipliers = _random(_SEED + 1, max(lengths, default=0)) | np.uint64(1)  # odd, so that no bit is lost

    # Each step extends all windows by one word, so all lengths cost one pass of the longest.
    sums = np.zeros_like(values)
    for length, multiplier in enumerate(multipliers, start=1):
        windows = max(len(values) - length + 1, 0)
        sums = sums[:windows] + values[length - 1 :] * multiplier
        if length in lengths:
            found[length] = sums

    return found


def _random(seed: int, count: int) -> UInt64[np.ndarray, "count"]:
    """Returns `count` pseudorandom 64-bit numbers."""
    return np.random.default_rng(seed).integers(2**64, size=count, dtype=np.uint64, endpoint=False)


def _slots(hashes: UInt64[np.ndarray, "N"], count: int) -> UInt64[np.ndarray, "N"]:
    """Returns the low bits of hashes as indices into a table of `count` flags, a power of two."""
    return hashes & np.uint64(count - 1)


# Overlaps


@dataclasses.dataclass(frozen=True, order=True)
class Match:
    """The overlap of a document with one item.

    Attributes:
      file: the evaluation file.
      line: the line of the item in the file, from 1.
      words: the length of the longest run of the item's words in which every n-gram occurs in the document.
      share: the fraction of the item's words that are in n-grams that occur in the document.
      excerpt: the first words of the longest run.
    """

    file: str
    line: int
    words: int
    share: float
    excerpt: str


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The items that overlap with a document, longest run of words first. There is at least one."""

    matches: tuple[Match, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationNgrams:
    """The n-grams of evaluation files. It can be pickled, and gives the same results in every process.

    The rule is that of GPT-3 (Brown et al. 2020, appendix C), which lm-evaluation-harness also uses: a document is
    contaminated if it has any n consecutive words in common with an item. A text of an item with fewer words is
    searched for as a whole. A text of fewer than `evaluation_texts.SHORTEST` words is not searched for, because such
    runs occur everywhere.

    Attributes:
      n: the number of words in an n-gram.
      texts: the texts of all items.
      values: a pseudorandom number for each word, and one for all unknown words.
      tables: a table for each length of n-grams.
    """

    n: int
    texts: EvaluationTexts
    values: UInt64[np.ndarray, "vocabulary_and_unknown"]
    tables: tuple[NgramTable, ...]

    @property
    def files(self) -> tuple[EvaluationFile, ...]:
        """The evaluation files, in the given order."""
        return self.texts.files

    def overlap(self, text: str) -> Overlap | None:
        """Returns the items that a text overlaps with, or None."""
        places = self._common_places(text)
        if not len(places):
            return None

        # Positions are sorted and the texts of an item are adjacent, so each item is a contiguous range.
        items = self.texts.items[self._texts_at(places)]
        starts = np.flatnonzero(np.diff(items, prepend=-1))
        matches = [self._match(inside) for inside in np.split(places, starts[1:])]
        return Overlap(tuple(sorted(matches, key=lambda match: (-match.words, match.file, match.line))))

    def _common_places(self, text: str) -> Int64[np.ndarray, "places"]:
        """Returns the sorted positions in `texts.words` at which n-grams begin that also occur in the text."""
        # Unknown words share a value, so a window with one matches nothing: no evaluation text has that value.
        values = self.values[self._numbers(text)]
        hashes = window_hashes(values, tuple(table.length for table in self.tables))
        return np.sort(np.concatenate([np.zeros(0, np.int64), *(t.find(hashes[t.length]) for t in self.tables)]))

    def _numbers(self, text: str) -> Int64[np.ndarray, "words"]:
        """Returns the number of each word of a text. Words that no item has share one number."""
        unknown = len(self.vocabulary)
        return np.array([self.vocabulary.get(word, unknown) for word in words(text)], np.int64)

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """The number of each word of the items."""
        return {word: number for number, word in enumerate(self.texts.spellings)}

    def _texts_at(self, places: Int64[np.ndarray, "places"]) -> Int64[np.ndarray, "places"]:
        """Returns the index of the text at each position."""
        return np.searchsorted(self.texts.starts, places, side="right") - 1

    def _match(self, places: Int64[np.ndarray, "places"]) -> Match:
        """Returns the match with one item, given the positions of all its n-grams that were found."""
        # All positions are in texts of the same item.
        texts = self._texts_at(places)
        [item] = set(self.texts.items[texts].tolist())

        runs = _runs(places, self.texts.windows[texts])
        start, end = max(runs, key=lambda run: run[1] - run[0])

        file, line = self.texts.lines[item].tolist()
        excerpt = self.texts.words[start : min(end, start + _EXCERPT_WORDS)]
        return Match(
            file=self.files[file].name,
            line=line,
            words=end - start,
            share=_covered(runs) / int(self.texts.sizes[item]),
            excerpt=" ".join(self.texts.spellings[word] for word in excerpt),
        )


# Loading


def load_evaluation_ngrams(paths: Sequence[str], n: int = NGRAM, *, key: str | None = None) -> EvaluationNgrams:
    """Reads evaluation files, .jsonl or .txt with one item per line, and returns their n-grams.

    Args:
      paths: paths and globs of the files.
      n: the number of words in an n-gram.
      key: for .jsonl, the field with the texts; by default every string of an item is a text.

    Raises:
      UserError: n is below 2, or a file is missing, has another format or no text, or has a malformed line.
    """
    if n < 2:
        raise UserError(f"n-grams of {n} words would match everything; give a number of words from 2, 13 is usual")

    builder = TextsBuilder(n)
    for file in evaluation_files(paths):
        builder.add_file(file.name, read_items(file, key))

    texts = builder.build()
    values = word_values(len(texts.spellings) + 1)  # the last one is for all words that no item has
    return EvaluationNgrams(n=n, texts=texts, values=values, tables=_tables(texts, values))


def _tables(texts: EvaluationTexts, values: UInt64[np.ndarray, "vocabulary_and_unknown"]) -> tuple[NgramTable, ...]:
    """Returns a table for each length of n-grams."""
    lengths = tuple(np.unique(texts.windows).tolist())
    hashes = window_hashes(values[texts.words], lengths)

    tables = []
    for length in lengths:
        # All positions at which an n-gram of this length fits into its text.
        chosen = np.flatnonzero(texts.windows == length)
        ranges = [np.arange(texts.starts[text], texts.starts[text + 1] - length + 1) for text in chosen]
        places = np.concatenate(ranges)
        tables.append(NgramTable.of(length, hashes[length][places], places))

    return tuple(tables)


# Runs of words


def _runs(places: Int64[np.ndarray, "places"], windows: np.ndarray) -> list[tuple[int, int]]:
    """Returns the start and the end of each run of words that consists of n-grams at consecutive positions.

    An n-gram at the start of a text never extends a run of the previous text: the last position of that text is a whole
    n-gram before its end.
    """
    first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    last = np.append(first[1:] - 1, len(places) - 1)
    return [(int(places[i]), int(places[j] + windows[j])) for i, j in zip(first, last)]


def _covered(runs: list[tuple[int, int]]) -> int:
    """Returns the number of words in any of the runs, which may overlap."""
    ends = [0, *(end for _, end in runs)]
    return sum(end - max(start, before) for (start, end), before in zip(runs, ends))


# Findings, which are collected per unit and can be merged


@dataclasses.dataclass(frozen=True, order=True)
class LocatedMatch:
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
        self.longest: list[LocatedMatch] = []

    def add(self, source: str, place: str, overlap: Overlap | None) -> None:
        """Counts a document of a source, which is dropped if it overlaps. `place` is its location for readers."""
        self.documents[source] += 1
        if overlap is None:
            return
        self.dropped[source] += 1
        # Every item counts as found, but only the longest match is shown for a document.
        self._found({(match.file, match.line): match.share for match in overlap.matches})
        self._keep_longest([LocatedMatch(source, place, overlap.matches[0])])

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
            LocatedMatch(placed["source"], placed["place"], Match(**placed["match"])) for placed in values["longest"]
        ]
        return findings

    def _found(self, shares: Mapping[tuple[str, int], float]) -> None:
        """Keeps the largest fraction of each item."""
        # The report says how much of an item any single document contains.
        for item, share in shares.items():
            self.shares[item] = max(share, self.shares.get(item, 0.0))

    def _keep_longest(self, matches: list[LocatedMatch]) -> None:
        """Keeps the longest of the old and the new matches."""
        # Ties are broken by the match itself, so the result does not depend on the order of merging.
        everything = sorted(self.longest + matches, key=lambda placed: (-placed.match.words, placed))
        self.longest = everything[:LONGEST]
