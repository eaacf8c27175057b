"""Documents as they are read, and the split of documents into training and validation.

A hash of its text decides whether a document is held out, independently of files and order.
"""

import dataclasses
import hashlib
import json

import numpy as np
from jaxtyping import Int64, UInt64

_KEY_BYTES = 8  # keys have 64 bits


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # such as "user" or "assistant"
    content: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, as text or as the messages of a chat, and its answer."""

    prompt: str | tuple[Message, ...]
    answer: str


Document = str | tuple[Message, ...] | Problem
"""A text, a chat or a problem."""


def plain_text(document: Document) -> str:
    """Returns the text of a document.

    The messages of a chat are joined without their roles, which is enough to compare documents or to train a tokenizer.
    """
    if isinstance(document, Problem):
        return f"{plain_text(document.prompt)}{document.answer}"
    return document if isinstance(document, str) else "\n\n".join(message.content for message in document)


# Validation split


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices of the training and the validation documents.

    Validation indices are sorted by key, an order that is random but fixed.
    """

    train: Int64[np.ndarray, "train"]
    validation: Int64[np.ndarray, "validation"]


def document_key(document: Document) -> int:
    """Returns a uniformly distributed 64-bit hash of a text, of the roles and contents of a chat, or of a problem."""
    if isinstance(document, Problem):
        document = json.dumps([f"{document_key(document.prompt)}", document.answer])
    text = document if isinstance(document, str) else _canonical_json(document)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest(), "big")


def is_validation(document: Document, fraction: float) -> bool:
    """Whether a document is held out, where `fraction` is the expected fraction of all documents."""
    return document_key(document) < _threshold(fraction)


def split_documents(keys: UInt64[np.ndarray, "N"], fraction: float) -> Split:
    """Splits N documents, given by their keys, with the same rule as `is_validation`."""
    held_out = keys < np.uint64(_threshold(fraction))
    validation = np.flatnonzero(held_out)
    order = np.argsort(keys[validation], kind="stable")
    return Split(train=np.flatnonzero(~held_out), validation=validation[order])


def _canonical_json(chat: tuple[Message, ...]) -> str:
    """Returns a unique JSON encoding of a chat, to be hashed."""
    messages = [{"role": message.role, "content": message.content} for message in chat]
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _threshold(fraction: float) -> int:
    """Returns the key below which a document is held out."""
    return int(fraction * 2 ** (8 * _KEY_BYTES))
