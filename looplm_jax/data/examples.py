"""Conversion of documents to examples: tokens, and a mask of the tokens that the model learns to predict."""

import numpy as np

from looplm_jax.data.chat import tokens_and_mask
from looplm_jax.data.documents import Document, Example
from looplm_jax.data.tokenizers.base import Tokenizer


def to_example(record: Document | Example, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Tokenizes a text or a chat. A task's record is already an example and is returned unchanged.

    With `special`, names of special tokens in the text are parsed as these tokens.
    """
    if isinstance(record, Example):
        return record
    if isinstance(record, str):
        return document_example(record, tokenizer, special=special)
    return tokens_and_mask(record, tokenizer, special=special)


def document_example(text: str, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Returns the example `bos text eos`, in which every token but bos is a target."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(text, special=special), tokenizer.eos_id]
    return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


def chunks(example: Example, length: int) -> list[dict[str, np.ndarray]]:
    """Splits an example into chunks of at most `length` pairs of input token and next token.

    The last target of a chunk is the first input of the next, so every target appears exactly once. Chunks without a
    target are dropped.
    """
    # Inputs are all tokens but the last, and targets are all tokens but the first.
    features = {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.loss_mask[1:].astype(np.float32),
    }

    starts = range(0, len(example.tokens) - 1, length)
    pieces = ({name: values[start : start + length] for name, values in features.items()} for start in starts)
    return [piece for piece in pieces if piece["loss_mask"].any()]
