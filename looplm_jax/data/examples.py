"""One example: tokens, and which of them the model is taught to predict."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32

from looplm_jax.data.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A document, a problem or a chat. `loss_mask[i]` says that token i is a target; the first one never is."""

    tokens: Int32[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"]

    @classmethod
    def of(cls, tokens: Sequence[int], loss_mask: Sequence[bool]) -> "Example":
        """An example of plain lists."""
        return cls(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool))


def document_example(text: str, tokenizer: Tokenizer) -> Example:
    """`bos text eos`, every token but bos a target."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


def to_example(record: str | Example, tokenizer: Tokenizer) -> Example:
    """A document of a text source, or a task's example as it is."""
    return record if isinstance(record, Example) else document_example(record, tokenizer)


def chunks(example: Example, length: int) -> list[dict[str, np.ndarray]]:
    """The example as pairs of input and next token, cut into pieces of at most `length`.

    The last token of a piece's targets is the first input of the next piece, so no target is lost.
    """
    features = {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.loss_mask[1:].astype(np.float32),
    }
    starts = range(0, len(example.tokens) - 1, length)
    return [{name: values[start : start + length] for name, values in features.items()} for start in starts]
