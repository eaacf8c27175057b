"""An estimate of how many chunks of the chats in a mixture are dropped because no assistant turn overlaps them."""

import math
from collections.abc import Iterator

from looplm_jax.config import RecordKind
from looplm_jax.data.corpus import Corpus
from looplm_jax.data.examples import chunks
from looplm_jax.data.pipeline import as_examples
from looplm_jax.data.tokenizers.base import Tokenizer

_CHATS = 64


def pieces_left_out(corpus: Corpus, tokenizer: Tokenizer, sequence_length: int) -> Iterator[str]:
    """Yields one line for each chat source of which some chunks have no target and are dropped.

    The fraction is estimated on a random sample of up to 64 chats of the source. Text sources need no check, as every
    token of a text is a target. Prepared sources need none either: `looplm tokenize` counts their dropped chunks.
    """
    for part in corpus.texts:
        if part.config.kind is not RecordKind.CHAT:
            continue

        count = min(part.train_documents, _CHATS)
        examples = as_examples(part.train(0), part, tokenizer)
        sample = [examples[index] for index in range(count)]

        # The number of chunks if none were dropped, and the number that are kept.
        pieces = sum(math.ceil((len(example.tokens) - 1) / sequence_length) for example in sample)
        kept = sum(len(chunks(example, sequence_length)) for example in sample)
        if kept < pieces:
            yield (
                f"{part.config.path}: about {1 - kept / pieces:.0%} of the pieces of {sequence_length} tokens are left "
                f"out, because the assistant says nothing in them (counted in {count} chats)"
            )
