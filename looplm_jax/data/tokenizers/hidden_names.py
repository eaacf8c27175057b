"""A `tokenizer.json` with other names for its special tokens, so that no text gives their ids."""

import json
import uuid
from collections.abc import Collection, Iterator
from typing import Any


def template_names(content: bytes) -> set[str]:
    """The special tokens that the file's post-processor puts around a text."""
    return set(_names_of(json.loads(content).get("post_processor") or {}))


def unknown_token(content: bytes) -> str | None:
    """The name of the token that stands for text without one of its own, or None."""
    model = json.loads(content)["model"]
    if (place := model.get("unk_id")) is not None:
        return model["vocab"][place][0]
    return model.get("unk_token")


def with_names_hidden(content: bytes, names: Collection[str]) -> bytes:
    """The tokenizer with the same ids, in which the tokens of these names have random ones.

    The library's `encode_special_tokens` would not do: it only stops the search for added tokens. After that WordLevel,
    WordPiece, Unigram, and BPE with `ignore_merges` find the name among the words of the vocabulary.
    """
    file = json.loads(content)
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
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [merge for merge in model["merges"] if hidden.keys().isdisjoint(_touched(merge, prefix))]
    return json.dumps(file).encode()


def _touched(merge: str | list[str], prefix: str) -> tuple[str, str, str]:
    """The pieces that a merge joins, and the one that it makes."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(prefix)


def _names_of(processor: dict[str, Any]) -> Iterator[str]:
    yield from processor.get("special_tokens") or ()
    yield from (processor[place][0] for place in ("cls", "sep") if place in processor)
    for inner in processor.get("processors") or ():
        yield from _names_of(inner)
