"""Training batches: sources, mixed by weight, tokenised, packed, batched and prefetched."""

import functools
import hashlib
from collections.abc import Iterator

import grain
import grain.experimental

from looplm_jax.config import DataConfig
from looplm_jax.data.corpus import Corpus, open_corpus
from looplm_jax.data.documents import plain_text
from looplm_jax.data.examples import to_example
from looplm_jax.data.iterator import BatchIterator, Geometry, Stream, stream_identity
from looplm_jax.data.packing import pack
from looplm_jax.data.parts import Part
from looplm_jax.data.row_batches import RowBatches
from looplm_jax.data.task_batches import Blocks, TaskBatches
from looplm_jax.data.tokenizers.base import Tokenizer
from looplm_jax.errors import UserError

# Reading hides the latency of remote files; results come back in order, whatever the threads do.
READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=32)
_BATCHES_AHEAD = 4


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
    """Rows, for one process, of an endless stream of packed batches.

    Every process reads documents of its own and holds `batch_size / process_count` rows. The stream depends on the
    arguments alone, not on time or threads. Pass a `Corpus` to open the files only once for several streams.

    Raises:
      UserError: bad data (see `open_corpus`), a batch that the processes cannot share, a task with another tokeniser,
        or a sequence shorter than a problem.
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
        rows = pack(records().to_iter_dataset(READING), sequence_length, shuffle_seed=_derived_seed(seed, "rows"))
        batches = rows.batch(geometry.rows, drop_remainder=True)
        return iter(grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=_BATCHES_AHEAD))

    if corpus.prepared:
        return BatchIterator(RowBatches(records(), geometry.rows), identity)
    if corpus.tasks:
        seeds = [_derived_seed(seed, number) for number in range(len(corpus.tasks))]
        blocks = Blocks(corpus.tasks, seeds, sequence_length)
        batches = TaskBatches(blocks, geometry.rows, first=process_index, stride=process_count)
        return BatchIterator(batches, identity, one_by_one=packed)
    return BatchIterator(packed(), identity)


def mixture(
    corpus: Corpus,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    tokenizer: Tokenizer | None = None,
) -> grain.MapDataset:
    """Training records of all parts by weight, without end. Of every part each process takes its own share.

    The share is cut before mixing: cut after, a process could get one source only, since the mixture is periodic.
    Documents become examples where a tokenizer is given; prepared rows stay as they are.
    """
    streams = [
        part.train(_derived_seed(seed, number))[process_index::process_count]
        for number, part in enumerate(corpus.parts)
    ]
    if tokenizer is not None and not corpus.prepared:
        streams = [as_examples(stream, part, tokenizer) for stream, part in zip(streams, corpus.parts, strict=True)]
    return grain.MapDataset.mix(streams, weights=[part.config.weight for part in corpus.parts])


def as_examples(records: grain.MapDataset, part: Part, tokenizer: Tokenizer) -> grain.MapDataset:
    """Returns the examples that documents of a part become."""
    return records.map(functools.partial(to_example, tokenizer=tokenizer, special=part.config.special_tokens))


def training_texts(data: DataConfig | Corpus, *, seed: int = 0) -> Iterator[str]:
    """As many documents of the training mixture as an epoch has, to train a tokeniser on. None is held out."""
    corpus = as_corpus(data)
    if corpus.own_tokenizer is not None:
        raise UserError(f"{corpus.parts[0].config.path!r} has its own tokenizer; there is none to train")
    records = mixture(corpus, seed)
    return (plain_text(records[index]) for index in range(corpus.train_documents))


def as_corpus(data: DataConfig | Corpus) -> Corpus:
    """The corpus itself, or the one that a configuration describes."""
    return data if isinstance(data, Corpus) else open_corpus(data)


def check_fit(corpus: Corpus, tokenizer: Tokenizer, sequence_length: int) -> None:
    """Raise UserError where a task or prepared rows come with another tokeniser, or do not fit a sequence."""
    if sequence_length < 1:
        raise UserError(f"sequence_length must be at least 1, not {sequence_length}")
    for part in corpus.tasks:
        if part.task.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(f"the task {part.config.path!r} has its own tokenizer; leave data.tokenizer empty")
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
                f"{prepared.config.path!r} is prepared in rows of {plan.sequence_length}, and sequence_length is "
                f"{sequence_length}; set it to {plan.sequence_length}, or prepare it again"
            )


def _derived_seed(seed: int, use: int | str) -> int:
    """Seeds that have nothing to do with each other, one for each use; Grain takes 32 bits."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{use}".encode(), digest_size=4).digest(), "big")
