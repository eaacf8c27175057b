"""The texts of evaluation items as numbers of words, with the length of the n-grams that are looked for in each."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from looplm_jax.data.cleaning.evaluation_files import EvaluationItem
from looplm_jax.data.cleaning.words import length_in_words, words

SHORTEST = 8  # words; GPT-3: "due to spurious collisions at lower values of N" (Brown et al. 2020, appendix C)


@dataclasses.dataclass(frozen=True)
class EvaluationFile:
    """An evaluation file, how many items it has, and how many of them are too short to be looked for."""

    name: str
    items: int
    too_short: int


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationTexts:
    """All texts that are looked for, one after the other.

    Attributes:
      files: where they come from.
      spellings: the word of every number.
      words: the numbers of the words of all texts.
      starts: text i is words `starts[i]..starts[i + 1]`.
      windows: words of an n-gram of text i.
      items: the item of text i.
      lines: the file of an item, and its line in it.
      sizes: words of all texts of an item.
    """

    files: tuple[EvaluationFile, ...]
    spellings: tuple[str, ...]
    words: Int32[np.ndarray, "words"]
    starts: Int64[np.ndarray, "texts_and_end"]
    windows: Int32[np.ndarray, "texts"]
    items: Int32[np.ndarray, "texts"]
    lines: Int32[np.ndarray, "items file_and_line"]
    sizes: Int64[np.ndarray, "items"]


class TextsBuilder:
    """Collects the texts of items."""

    def __init__(self, n: int):
        self._n = n
        self._files: list[EvaluationFile] = []
        self._vocabulary: dict[str, int] = {}
        self._texts: list[np.ndarray] = []
        self._windows: list[int] = []
        self._items: list[int] = []
        self._lines: list[tuple[int, int]] = []

    def add_file(self, name: str, items: Sequence[EvaluationItem]) -> None:
        """Take the items of a file."""
        too_short = sum(not self._add_item(item) for item in items)
        self._files.append(EvaluationFile(name, len(items), too_short))

    def _add_item(self, item: EvaluationItem) -> bool:
        """Whether any text of the item is long enough."""
        long_enough = False
        for text in item.texts:
            units = words(text)
            window = ngram_length(units, self._n)
            if window:
                numbers = [self._vocabulary.setdefault(unit, len(self._vocabulary)) for unit in units]
                self._texts.append(np.array(numbers, np.int32))
                self._windows.append(window)
                self._items.append(len(self._lines))
                long_enough = True
        self._lines.append((len(self._files), item.line))
        return long_enough

    def build(self) -> EvaluationTexts:
        """All that was added."""
        lengths = [len(text) for text in self._texts]
        return EvaluationTexts(
            files=tuple(self._files),
            spellings=tuple(self._vocabulary),
            words=np.concatenate([np.zeros(0, np.int32), *self._texts]),
            starts=np.cumsum([0, *lengths]),
            windows=np.array(self._windows, np.int32),
            items=np.array(self._items, np.int32),
            lines=np.array(self._lines, np.int32).reshape(-1, 2),
            sizes=np.bincount(self._items, lengths, minlength=len(self._lines)).astype(np.int64),
        )


def ngram_length(units: Sequence[str], n: int) -> int:
    """How many of a text's units (`words.words`) make an n-gram: all of a short text, none of one that is too short.

    In scripts without spaces, units are characters, so an n-gram of n words is several times n units.
    """
    total = length_in_words(units)
    if total < min(n, SHORTEST):
        return 0
    return min(math.ceil(n * len(units) / total), len(units))
