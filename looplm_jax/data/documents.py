"""What flows through the pipeline: documents as they are read, and examples, which they are tokenised to."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Document = str | tuple[Message, ...]
"""A text or a chat."""


def plain_text(document: Document) -> str:
    """A text, or what is said in a chat: to compare documents, or to train a tokeniser on."""
    return document if isinstance(document, str) else "\n\n".join(message.content for message in document)


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A document, a problem or a chat. `loss_mask[i]` says that token i is a target; the first one never is."""

    tokens: Int32[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"]

    @classmethod
    def of(cls, tokens: Sequence[int], loss_mask: Sequence[bool]) -> "Example":
        """An example of plain lists."""
        return cls(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))
