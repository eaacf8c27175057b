"""The texts of evaluation items as arrays of word numbers, with the length of the n-grams to search for in each."""

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
    """The name of an evaluation file, the number of its items, and how many are too short to search for."""

    name: str
    items: int
    too_short: int


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationTexts:
    """All texts to search for, concatenated.

    Attributes:
      files: the files that the texts are from.
      spellings: the word of each word number.
      words: the word numbers of all texts, concatenated.
      starts: text i is `words[starts[i]:starts[i + 1]]`.
      windows: the number of words in an n-gram of text i.
      items: the item of text i.
      lines: the file of each item, and its line in the file.
      sizes: the number of words in all texts of each item.
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
    """Builds `EvaluationTexts` from the items of one or several files."""

    def __init__(self, n: int):
        self._n = n
        self._files: list[EvaluationFile] = []
        self._vocabulary: dict[str, int] = {}
        self._texts: list[np.ndarray] = []
        self._windows: list[int] = []
        self._items: list[int] = []
        self._lines: list[tuple[int, int]] = []

    def add_file(self, name: str, items: Sequence[EvaluationItem]) -> None:
        """Adds the items of a file."""
        too_short = sum(not self._add_item(item) for item in items)
        self._files.append(EvaluationFile(name, len(items), too_short))

    def _add_item(self, item: EvaluationItem) -> bool:
        """Adds an item. Returns whether any of its texts is long enough to search for."""
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

        # Every item has an entry, even if all of its texts are too short, so that item numbers index `lines`.
        self._lines.append((len(self._files), item.line))
        return long_enough

    def build(self) -> EvaluationTexts:
        """Returns everything that was added."""
        # The empty array below gives the dtype if there are no texts.
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
    """Returns the number of a text's units (`words.words`) in an n-gram.

    For a text shorter than n words, it is the whole text. For one that is too short to search for, it is 0. In scripts
    without spaces, units are characters, so an n-gram of n words has a multiple of n units.
    """
    total = length_in_words(units)
    if total < min(n, SHORTEST):
        return 0
    # Convert words to units by the text's own average.
    return min(math.ceil(n * len(units) / total), len(units))
