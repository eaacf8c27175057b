"""Training and validation data: sources, mixtures, packing, the chat format, and synthetic tasks.

A `DataConfig` lists the sources of a mixture: files, datasets, synthetic tasks, or corpora that `looplm tokenize`
prepared (see `looplm_jax.corpus`). `train_batches` returns an endless iterator over packed batches. It is a pure
function of its arguments, and its state, a few hundred bytes of JSON, resumes it exactly:

    >>> from looplm_jax.config import DataConfig, SourceConfig
    >>> from looplm_jax.data import open_corpus, train_batches
    >>> corpus = open_corpus(DataConfig(sources=(SourceConfig(path="mano:length=3"),)))
    >>> batches = train_batches(corpus, corpus.own_tokenizer, batch_size=2, sequence_length=64, seed=0)
    >>> next(batches).tokens.shape
    (2, 64)

Batches:
  `Batch`, `BatchIterator`, `train_batches`, `ValidationBatches`, `validation_batches`; `SubstreamBatches` and
  `substream_count` divide a global batch over processes.

Corpora and examples:
  `Corpus`, `open_corpus`, `training_texts`, `collect_stdlib`; `Example`, `Message`, `Problem`, `tokens_and_mask`.

Tokenizers, from `looplm_jax.data.tokenizers`:
  `Tokenizer`, `load_tokenizer`, `deserialize`, `check_vocab`, `train_sentencepiece`.

Subpackages: `sources` reads documents from files and datasets, `tokenizers` and `tasks` define what their names say.
"""

from etils import epy

# Names are imported on first use, because importing Grain alone takes seconds.
with epy.lazy_api_imports(globals()):
    # isort: off
    # Batches of packed sequences.
    from looplm_jax.data._packing import Batch
    from looplm_jax.data._iterator import BatchIterator, SubstreamBatches, substream_count
    from looplm_jax.data._pipeline import train_batches, training_texts
    from looplm_jax.data._validation import ValidationBatches, validation_batches

    # The sources of a mixture.
    from looplm_jax.data._mixture import Corpus, open_corpus
    from looplm_jax.data._stdlib_corpus import collect_stdlib

    # Chats and examples.
    from looplm_jax.data._documents import Message, Problem
    from looplm_jax.data._examples import Example, tokens_and_mask

    # Tokenizers.
    from looplm_jax.data.tokenizers._base import Tokenizer, check_vocab
    from looplm_jax.data.tokenizers._loading import deserialize, load_tokenizer
    from looplm_jax.data.tokenizers._sentencepiece import train_sentencepiece

__all__ = [
    "Batch",
    "BatchIterator",
    "Corpus",
    "Example",
    "Message",
    "Problem",
    "SubstreamBatches",
    "Tokenizer",
    "ValidationBatches",
    "check_vocab",
    "collect_stdlib",
    "deserialize",
    "load_tokenizer",
    "open_corpus",
    "substream_count",
    "tokens_and_mask",
    "train_batches",
    "train_sentencepiece",
    "training_texts",
    "validation_batches",
]
