"""The training pipeline: sources are mixed by weight, tokenized, packed, batched and prefetched."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator

import grain
import grain.experimental

from looplm_jax.config import DataConfig, RecordKind
from looplm_jax.data._documents import plain_text
from looplm_jax.data._examples import chunks, to_example
from looplm_jax.data._iterator import BatchIterator, Geometry, stream_identity
from looplm_jax.data._mixture import Corpus, MixtureSource, open_corpus
from looplm_jax.data._packing import pack
from looplm_jax.data._streams import Blocks, PreparedBatches, Stream, TaskBatches
from looplm_jax.data.tokenizers._base import Tokenizer
from looplm_jax.errors import UserError

# Threads hide the latency of remote files. Grain keeps the order of results, so the stream is deterministic.
READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=32)
_BATCHES_AHEAD = 4  # batches to prefetch

# Chats of which the chunks without a target are counted.
_CHATS = 64


# Training batches


def train_batches(
    data: DataConfig | Corpus,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> BatchIterator:
    """Returns an endless iterator over one process's shard of packed training batches.

    Every process reads its own documents. The stream is a pure function of the arguments and does not depend on timing
    or threads.

    Args:
      data: the configuration, or an opened `Corpus`, which lets several streams share the opened files.
      tokenizer: tokenizes text; for tasks and prepared sources it must be their own.
      batch_size: sequences in a global batch; a multiple of `process_count`.
      sequence_length: tokens in a sequence.
      seed: determines the order of the data.
      process_index: this process.
      process_count: processes that divide each batch; this one gets `batch_size / process_count` sequences.

    Raises:
      UserError: bad data (see `open_corpus`), a batch size that the processes do not divide, a task with another
        tokenizer, or a sequence that is shorter than a problem.
    """
    corpus = as_corpus(data)
    geometry = Geometry(
        batch_size=batch_size,
        sequence_length=sequence_length,
        process_index=process_index,
        process_count=process_count,
    )
    check_fit(corpus, tokenizer, sequence_length)
    identity = stream_identity(corpus, tokenizer, geometry, seed)

    def records() -> grain.MapDataset:
        return mixture(corpus, seed, process_index, process_count, tokenizer=tokenizer)

    def packed() -> Stream:
        # Packing is sequential, so it comes after the parallel reads, and before batching and prefetching.
        sequences = pack(records().to_iter_dataset(READING), sequence_length, shuffle_seed=_derived_seed(seed, "rows"))
        batches = sequences.batch(geometry.sequences, drop_remainder=True)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD))

    # Prepared sources need no packing, and tasks are packed in vectorized blocks; only text goes through Grain's
    # packer.
    if corpus.prepared:
        return BatchIterator(PreparedBatches(records(), geometry.sequences), identity)
    if corpus.tasks:
        # Two sources with the same seed would draw the same problems.
        seeds = [_derived_seed(seed, number) for number in range(len(corpus.tasks))]
        blocks = Blocks(corpus.tasks, seeds, sequence_length)
        batches = TaskBatches(blocks, geometry.sequences, first=process_index, stride=process_count)
        # Older states are positions in a stream that packs one problem at a time; `packed` opens that stream.
        return BatchIterator(batches, identity, one_by_one=packed)
    return BatchIterator(packed(), identity)


# Mixtures of sources


def mixture(
    corpus: Corpus,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    tokenizer: Tokenizer | None = None,
    convert: Callable[[grain.MapDataset, MixtureSource], grain.MapDataset] | None = None,
) -> grain.MapDataset:
    """Returns an endless dataset of training records, mixed by weight.

    Each process takes its own slice of every source. Sources are sliced before they are mixed: a mixture is periodic,
    so a slice of it could contain only one source.

    Args:
      corpus: the sources.
      seed: determines the order of each source.
      process_index: this process.
      process_count: processes that divide each source.
      tokenizer: converts documents to examples if given; prepared sequences are returned as they are.
      convert: converts the records of each source if given.
    """
    streams = [
        # Every `process_count`-th record, so that all processes finish an epoch of a source together.
        part.train(_derived_seed(seed, number))[process_index::process_count]
        for number, part in enumerate(corpus.sources)
    ]

    if tokenizer is not None and not corpus.prepared:
        streams = [as_examples(stream, part, tokenizer) for stream, part in zip(streams, corpus.sources, strict=True)]

    if convert is not None:
        streams = [convert(stream, part) for stream, part in zip(streams, corpus.sources, strict=True)]

    return grain.MapDataset.mix(streams, weights=[part.config.weight for part in corpus.sources])


def as_examples(records: grain.MapDataset, part: MixtureSource, tokenizer: Tokenizer) -> grain.MapDataset:
    """Returns the documents of a source as tokenized examples."""
    return records.map(functools.partial(to_example, tokenizer=tokenizer, special=part.config.special_tokens))


def training_texts(data: DataConfig | Corpus, *, seed: int = 0) -> Iterator[str]:
    """Returns an iterator over one epoch of training documents as text, to train a tokenizer on.

    Held-out documents are not included. Raises UserError for tasks and prepared sources, which have their own
    tokenizer.
    """
    corpus = as_corpus(data)
    if corpus.own_tokenizer is not None:
        raise UserError(f"{corpus.sources[0].config.path!r} has its own tokenizer; there is none to train")
    # One epoch is enough for a tokenizer; the mixture itself is endless.
    records = mixture(corpus, seed)
    return (plain_text(records[index]) for index in range(corpus.train_documents))


def as_corpus(data: DataConfig | Corpus) -> Corpus:
    """Returns the corpus itself, or opens the one that a configuration describes."""
    return data if isinstance(data, Corpus) else open_corpus(data)


# Checks


def check_fit(corpus: Corpus, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Checks that tasks and prepared sources match the tokenizer and fit the sequence length.

    Raises:
      UserError: a tokenizer differs, a problem is longer than a sequence, or the prepared sequences have another
        length.
    """
    if sequence_length < 1:
        raise UserError(f"sequence_length must be at least 1, not {sequence_length}")

    for part in corpus.tasks:
        if part.task.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the task {part.config.path!r} has its own tokenizer; leave data.tokenizer empty")
        # A problem of n tokens takes n - 1 positions: inputs are all tokens but the last.
        if part.task.max_tokens - 1 > sequence_length:
            raise UserError(
                f"a problem of {part.config.path!r} takes {part.task.max_tokens - 1} positions, more than "
                f"sequence_length={sequence_length}; raise sequence_length"
            )

    for prepared in corpus.prepared:
        plan = prepared.manifest.plan
        if plan.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{prepared.config.path!r} is prepared with another tokenizer than that of the run; leave "
                "data.tokenizer empty to use its own, or prepare it again"
            )
        if plan.sequence_length != sequence_length:
            raise UserError(
                f"{prepared.config.path!r} is prepared in sequences of {plan.sequence_length}, and sequence_length is "
                f"{sequence_length}; set it to {plan.sequence_length}, or prepare it again"
            )


def _derived_seed(seed: int, use: int | str) -> int:
    """Returns an independent 32-bit seed for each use; Grain accepts no more bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{use}".encode(), digest_size=4).digest(), "big")


# Chats without targets


def chunks_left_out(corpus: Corpus, tokenizer: Tokenizer, sequence_length: int) -> Iterator[str]:
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
