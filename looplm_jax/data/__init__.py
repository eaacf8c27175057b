"""Training and validation data: tokenizers, sources, mixtures, packing, the chat format, and synthetic tasks.

Public names are imported lazily, on first use (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looplm_jax.data.chat import tokens_and_mask
    from looplm_jax.data.corpus import Corpus, open_corpus
    from looplm_jax.data.documents import Example, Message
    from looplm_jax.data.iterator import BatchIterator
    from looplm_jax.data.lanes import LaneBatches, lane_count
    from looplm_jax.data.packing import Batch
    from looplm_jax.data.pipeline import train_batches, training_texts
    from looplm_jax.data.stdlib_corpus import collect_stdlib
    from looplm_jax.data.tokenizer_training import train_sentencepiece
    from looplm_jax.data.tokenizers import Tokenizer, check_vocab, deserialize, load_tokenizer
    from looplm_jax.data.validation import ValidationBatches, validation_batches

_HOMES = {
    "Batch": "packing",
    "BatchIterator": "iterator",
    "Corpus": "corpus",
    "Example": "documents",
    "LaneBatches": "lanes",
    "Message": "documents",
    "Tokenizer": "tokenizers",
    "ValidationBatches": "validation",
    "check_vocab": "tokenizers",
    "collect_stdlib": "stdlib_corpus",
    "deserialize": "tokenizers",
    "lane_count": "lanes",
    "load_tokenizer": "tokenizers",
    "open_corpus": "corpus",
    "tokens_and_mask": "chat",
    "train_batches": "pipeline",
    "train_sentencepiece": "tokenizer_training",
    "training_texts": "pipeline",
    "validation_batches": "validation",
}

__all__ = [
    "Batch",
    "BatchIterator",
    "Corpus",
    "Example",
    "LaneBatches",
    "Message",
    "Tokenizer",
    "ValidationBatches",
    "check_vocab",
    "collect_stdlib",
    "deserialize",
    "lane_count",
    "load_tokenizer",
    "open_corpus",
    "tokens_and_mask",
    "train_batches",
    "train_sentencepiece",
    "training_texts",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    """Imports the module that defines `name` on first access, because importing Grain alone takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
