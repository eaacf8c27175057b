"""The records of the pipeline: documents as they are read, and examples as they are tokenized."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # such as "user" or "assistant"
    content: str


Document = str | tuple[Message, ...]
"""A text or a chat."""


def plain_text(document: Document) -> str:
    """Returns the text of a document.

    The messages of a chat are joined without their roles, which is enough to compare documents or to train a tokenizer.
    """
    return document if isinstance(document, str) else "\n\n".join(message.content for message in document)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A tokenized document, chat or problem of N tokens.

    `loss_mask[i]` is true if token i is a prediction target. The first token never is, because nothing precedes it.
    """

    tokens: Int32[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"]

    @classmethod
    def of(cls, tokens: Sequence[int], loss_mask: Sequence[bool]) -> "Example":
        """Returns an example with arrays made from plain lists."""
        return cls(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))
