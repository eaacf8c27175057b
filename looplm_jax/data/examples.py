"""Documents as examples: tokens, and which of them the model is taught to predict."""

import numpy as np

from looplm_jax.data.chat import tokens_and_mask
from looplm_jax.data.documents import Document, Example
from looplm_jax.data.tokenizers.base import Tokenizer


def to_example(record: Document | Example, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """Returns a text or a chat of a source as an example, or a task's example as it is.

    With `special`, names of special tokens in the text become these tokens.
    """
    if isinstance(record, Example):
        return record
    if isinstance(record, str):
        return document_example(record, tokenizer, special=special)
    return tokens_and_mask(record, tokenizer, special=special)


def document_example(text: str, tokenizer: Tokenizer, *, special: bool = False) -> Example:
    """`bos text eos`, every token but bos a target."""
    tokens = [tokenizer.bos_id, *tokenizer.encode(text, special=special), tokenizer.eos_id]
    return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


def chunks(example: Example, length: int) -> list[dict[str, np.ndarray]]:
    """The example as pairs of input and next token, cut into pieces of at most `length`.

    The last token of a piece's targets is the first input of the next piece, so no target is lost. Pieces without a
    target are left out.
    """
    features = {
        "tokens": example.tokens[:-1],
        "targets": example.tokens[1:],
        "loss_mask": example.loss_mask[1:].astype(np.float32),
    }
    starts = range(0, len(example.tokens) - 1, length)
    pieces = ({name: values[start : start + length] for name, values in features.items()} for start in starts)
    return [piece for piece in pieces if piece["loss_mask"].any()]
