"""The validation split: a hash of its text decides whether a document is held out, so files may come in any order."""

import dataclasses
import hashlib
import json

import numpy as np
from jaxtyping import Int64, UInt64

from looplm_jax.data.documents import Document, Message

_KEY_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Split:
    """Indices of the documents of each part. Validation is in the order of the keys, which is random but fixed."""

    train: Int64[np.ndarray, "train"]
    validation: Int64[np.ndarray, "validation"]


def document_key(document: Document) -> int:
    """A uniform 64-bit number that depends on the text and on nothing else; that of a chat, on roles and contents."""
    text = document if isinstance(document, str) else _canonical_json(document)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest(), "big")


def is_validation(document: Document, fraction: float) -> bool:
    """Whether a document is held out when `fraction` of all possible documents are."""
    return document_key(document) < _threshold(fraction)


def split_documents(keys: UInt64[np.ndarray, "N"], fraction: float) -> Split:
    """The same decision for many documents, given by their keys."""
    held_out = keys < np.uint64(_threshold(fraction))
    validation = np.flatnonzero(held_out)
    order = np.argsort(keys[validation], kind="stable")
    return Split(train=np.flatnonzero(~held_out), validation=validation[order])


def _canonical_json(chat: tuple[Message, ...]) -> str:
    messages = [{"role": message.role, "content": message.content} for message in chat]
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _threshold(fraction: float) -> int:
    return int(fraction * 2 ** (8 * _KEY_BYTES))
