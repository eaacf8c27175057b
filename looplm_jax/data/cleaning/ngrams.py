"""Decontamination: which items of evaluations stand in a text, by runs of words that both have in common."""

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
    """What a document and one item have in common.

    Attributes:
      file: the evaluation file.
      line: the line of the item in it, from 1.
      words: length of the longest run of the item's words all of whose n-grams stand in the document.
      share: of the item's words that are looked for, those in n-grams that stand in the document.
      excerpt: the first words of that run.
    """

    file: str
    line: int
    words: int
    share: float
    excerpt: str


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The items of which something stands in a document, the longest run of words first. There is at least one."""

    matches: tuple[Match, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationNgrams:
    """The n-grams of evaluation files. It can be pickled, and says the same in every process.

    The rule is that of GPT-3 (Brown et al. 2020, appendix C), which lm-evaluation-harness uses too: a document is
    contaminated if it has any n words in a row in common with an item. A shorter text of an item is looked for as a
    whole; one of fewer than `evaluation_texts.SHORTEST` words is not, since such runs are found everywhere.
    """

    n: int
    texts: EvaluationTexts
    values: UInt64[np.ndarray, "vocabulary_and_unknown"]
    tables: tuple[NgramTable, ...]

    @property
    def files(self) -> tuple[EvaluationFile, ...]:
        """The evaluation files, in the order given."""
        return self.texts.files

    def overlap(self, text: str) -> Overlap | None:
        """What a text has in common with the items; None if nothing."""
        places = self._common_places(text)
        if not len(places):
            return None
        items = self.texts.items[self._texts_at(places)]
        starts = np.flatnonzero(np.diff(items, prepend=-1))
        matches = [self._match(inside) for inside in np.split(places, starts[1:])]
        return Overlap(tuple(sorted(matches, key=lambda match: (-match.words, match.file, match.line))))

    def _common_places(self, text: str) -> Int64[np.ndarray, "places"]:
        """The places in `texts.words` at which n-grams begin that stand in `text` too, sorted."""
        values = self.values[self._numbers(text)]
        hashes = window_hashes(values, tuple(table.length for table in self.tables))
        return np.sort(np.concatenate([np.zeros(0, np.int64), *(t.find(hashes[t.length]) for t in self.tables)]))

    def _numbers(self, text: str) -> Int64[np.ndarray, "words"]:
        unknown = len(self.vocabulary)
        return np.array([self.vocabulary.get(word, unknown) for word in words(text)], np.int64)

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """The number of every word of the items."""
        return {word: number for number, word in enumerate(self.texts.spellings)}

    def _texts_at(self, places: Int64[np.ndarray, "places"]) -> Int64[np.ndarray, "places"]:
        return np.searchsorted(self.texts.starts, places, side="right") - 1

    def _match(self, places: Int64[np.ndarray, "places"]) -> Match:
        """The match of one item, given the places of all its n-grams that were found."""
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


def load_evaluation_ngrams(paths: Sequence[str], n: int = NGRAM, *, key: str | None = None) -> EvaluationNgrams:
    """Read evaluation files: .jsonl (every string of an item, or that of `key` alone) or .txt, one item a line.

    Raises:
      UserError: n below 2, or a file that is missing, of another kind, without text or with a bad line.
    """
    if n < 2:
        raise UserError(f"n-grams of {n} words would match everything; give a number of words from 2, 13 is usual")
    builder = TextsBuilder(n)
    for file in evaluation_files(paths):
        builder.add_file(file.name, read_items(file, key))
    texts = builder.build()
    values = word_values(len(texts.spellings) + 1)  # the last one stands for all words that no item has
    return EvaluationNgrams(n=n, texts=texts, values=values, tables=_tables(texts, values))


def _tables(texts: EvaluationTexts, values: UInt64[np.ndarray, "vocabulary_and_unknown"]) -> tuple[NgramTable, ...]:
    """A table for each length of n-grams."""
    lengths = tuple(np.unique(texts.windows).tolist())
    hashes = window_hashes(values[texts.words], lengths)
    tables = []
    for length in lengths:
        chosen = np.flatnonzero(texts.windows == length)
        ranges = [np.arange(texts.starts[text], texts.starts[text + 1] - length + 1) for text in chosen]
        places = np.concatenate(ranges)
        tables.append(NgramTable.of(length, hashes[length][places], places))
    return tuple(tables)


def _runs(places: Int64[np.ndarray, "places"], windows: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of words begin and end that are made of n-grams at consecutive places.

    An n-gram at the start of a text never continues one of the text before: that one's last place is a whole n-gram
    before its end.
    """
    first = np.flatnonzero(np.diff(places, prepend=-2) != 1)
    last = np.append(first[1:] - 1, len(places) - 1)
    return [(int(places[i]), int(places[j] + windows[j])) for i, j in zip(first, last)]


def _covered(runs: list[tuple[int, int]]) -> int:
    """Words in any of the runs, which may overlap."""
    ends = [0, *(end for _, end in runs)]
    return sum(end - max(start, before) for (start, end), before in zip(runs, ends))
