"""Documents as examples: tokens, and which of them the model is taught to predict."""

import numpy as np

from looplm_jax.data.chat import tokens_and_mask
from looplm_jax.data.documents import Document, Example
from looplm_jax.data.tokenizers.base import Tokenizer


def to_example(record: Document | Example, tokenizer: Tokenizer) -> Example:
    """A text or a chat of a source, or a task's example as it is."""
    if isinstance(record, Example):
        return record
    return document_example(record, tokenizer) if isinstance(record, str) else tokens_and_mask(record, tokenizer)


def document_example(text: str, tokenizer: Tokenizer) -> Example:
    """`bos text eos`, every token but bos a target."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
    return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


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
