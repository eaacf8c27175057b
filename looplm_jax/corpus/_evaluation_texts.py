"""Evaluation files, and the texts of their items as arrays of word numbers.

An evaluation file has one item per line, as JSON or as plain text.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from looplm_jax.corpus._words import length_in_words, words
from looplm_jax.data.sources._discovery import find_files
from looplm_jax.data.sources._files import DataFile
from looplm_jax.data.sources._formats import BadRecord, decode, load_json
from looplm_jax.errors import UserError, suggest

SHORTEST = 8  # words; GPT-3: "due to spurious collisions at lower values of N" (Brown et al. 2020, appendix C)


# Files


@dataclasses.dataclass(frozen=True)
class EvaluationItem:
    """The texts of one item (question, choices, answer), and the number of its line, from 1."""

    line: int
    texts: tuple[str, ...]


def evaluation_files(patterns: Sequence[str]) -> tuple[DataFile, ...]:
    """Returns the files of paths and globs, each once, in the given order.

    Raises UserError if a path matches nothing.
    """
    # A dictionary keeps the order and drops files that several patterns match.
    return tuple(
        {file.name: file for pattern in patterns for file in find_files(pattern, by_content=False).files}.values()
    )


def read_items(file: DataFile, key: str | None = None) -> tuple[EvaluationItem, ...]:
    """Returns the items of a .txt file, one per line, or of a .jsonl file.

    Args:
      file: the evaluation file.
      key: for .jsonl, the field with the texts; by default every string in a line is a text.

    Raises:
      UserError: the file has another suffix or no text, or a line is malformed (its number is in the message).
    """
    if file.suffix not in (".jsonl", ".txt"):
        raise UserError(f"{file.name}: an evaluation file is .jsonl or .txt with one item a line; convert it to one")

    items = []
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            try:
                texts = _texts(line, file.suffix, key)
            # Never skipped: documents that overlap with the item would stay in the training data.
            except BadRecord as problem:
                raise UserError(
                    f"{file.name}:{number}: {problem}; fix it, because it is an item of an evaluation"
                ) from None
            if texts:
                items.append(EvaluationItem(number, texts))

    if not items:
        raise UserError(f"{file.name} holds no text to look for; give a .jsonl or .txt file with one item a line")

    return tuple(items)


def _texts(line: bytes, suffix: str, key: str | None) -> tuple[str, ...]:
    """Returns the texts of an item that are not blank. Raises BadRecord."""
    # A blank line is not an item.
    if not line.strip():
        return ()
    texts = _json_texts(load_json(line.strip()), key) if suffix == ".jsonl" else [decode(line, "line", "utf-8-sig")]
    return tuple(text for text in texts if text.strip())


def _json_texts(record: Any, key: str | None) -> list[str]:
    """Returns the strings of a JSON object, or of one of its fields. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but {type(record).__name__}")
    if key is not None and key not in record:
        raise BadRecord(f"the item has no field {key!r}{suggest(key, record)}")
    return list(_strings(record if key is None else record[key]))


def _strings(value: Any) -> Iterator[str]:
    """Yields the strings in a JSON value, at any depth, except field names."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        # Names of fields are structure, not text of the item.
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


# Texts


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
                # Equal words have equal numbers, in all files.
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
