"""Variants of a `tokenizer.json` in which special tokens have random names, so that no text is encoded as one."""

import json
import uuid
from collections.abc import Collection, Iterator
from typing import Any


def template_names(content: bytes) -> set[str]:
    """Returns the special tokens that the file's post-processor adds around a text."""
    return set(_names_of(json.loads(content).get("post_processor") or {}))


def unknown_token(content: bytes) -> str | None:
    """Returns the name of the token for text that the vocabulary cannot express, or None."""
    model = json.loads(content)["model"]
    if (place := model.get("unk_id")) is not None:
        return model["vocab"][place][0]
    return model.get("unk_token")


def with_names_hidden(content: bytes, names: Collection[str]) -> bytes:
    """Returns the tokenizer with the same ids, but with random names for the given special tokens.

    The library's option `encode_special_tokens` is not sufficient: it only disables the search for added tokens.
    WordLevel, WordPiece, Unigram, and BPE with `ignore_merges` would still find the names among the words of the
    vocabulary.
    """
    file = json.loads(content)
    # Random names cannot occur in a text by accident.
    hidden = {name: uuid.uuid4().hex for name in names}
    for token in file.get("added_tokens", ()):
        token["content"] = hidden.get(token["content"], token["content"])

    model = file["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {hidden.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]

    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]

    # Merges that involve a hidden piece must go, because the library rejects merges of unknown pieces.
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if hidden.keys().isdisjoint(_touched(merge, prefix))]

    return json.dumps(file).encode()


def _touched(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """Returns the two pieces that a merge joins and the piece that it creates."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def _names_of(processor: dict[str, Any]) -> Iterator[str]:
    """Yields the names of special tokens in a post-processor and in those nested in it."""
    yield from processor.get("special_tokens") or ()
    yield from (processor[place][0] for place in ("cls", "sep") if place in processor)
    for inner in processor.get("processors") or ():
        yield from _names_of(inner)
