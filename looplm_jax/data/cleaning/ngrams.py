"""Decontamination: finds evaluation items in a text by the runs of words that both have in common."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.data.cleaning.evaluation_files import evaluation_files, read_items
from looplm_jax.data.cleaning.evaluation_texts import EvaluationFile, EvaluationTexts, TextsBuilder
from looplm_jax.data.cleaning.ngram_table import NgramTable, window_hashes, word_values
from looplm_jax.data.cleaning.words import words
from looplm_jax.errors import UserError

NGRAM = 13
_EXCERPT_WORDS = 30


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
