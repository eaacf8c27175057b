"""Evaluation files: one item per line, as JSON or as plain text."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from looplm_jax.data.sources.bad_records import BadRecord
from looplm_jax.data.sources.discovery import find_files
from looplm_jax.data.sources.files import DataFile
from looplm_jax.data.sources.records import decode, load_json
from looplm_jax.errors import UserError, suggest


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
                raise UserError(f"{file.name}:{number}: {problem}; mend it, it is an item of an evaluation") from None
            if texts:
                items.append(EvaluationItem(number, texts))

    if not items:
        raise UserError(f"{file.name} holds no text to look for; give a .jsonl or .txt file with one item a line")

    return tuple(items)


def _texts(line: bytes, suffix: str, key: str | None) -> tuple[str, ...]:
    """Returns the texts of an item that are not blank. Raises BadRecord."""
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
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
