"""Validation batches: the same held-out sequences for any number of processes."""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import grain
import numpy as np

from looplm_jax.config import DataConfig
from looplm_jax.data._examples import Example
from looplm_jax.data._iterator import Geometry
from looplm_jax.data._mixture import Corpus
from looplm_jax.data._packing import Batch, as_batch, pack
from looplm_jax.data._pipeline import READING, as_corpus, as_examples, check_fit
from looplm_jax.data.tokenizers._base import Tokenizer
from looplm_jax.errors import UserError

# The seed of the shuffle. The order is fixed, and random so that the first sequences come from many documents.
_ORDER = 0


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """One process's shard of the held-out batches. It can be iterated over repeatedly."""

    batches: tuple[Batch[np.ndarray], ...]
    num_sequences: int  # over all processes, excluding the padding of the last batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch[np.ndarray]]:
        return iter(self.batches)


def validation_batches(
    data: DataConfig | Corpus,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    max_sequences: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> ValidationBatches:
    """Returns the first `max_sequences` packed held-out sequences in batches of `batch_size`.

    Sequence r of global batch b is held-out sequence `b * batch_size + r`, for any number of processes. Each process
    holds a contiguous range of a batch. The last batch is padded with sequences whose `segment_ids` and `loss_mask` are
    0.

    Args:
      data: the configuration, or an opened `Corpus`.
      tokenizer: tokenizes text; for tasks and prepared sources it must be their own.
      batch_size: sequences in a global batch; a multiple of `process_count`.
      sequence_length: tokens in a sequence.
      max_sequences: the number of sequences to use; all by default.
      process_index: this process.
      process_count: processes that divide each batch.

    Raises:
      UserError: nothing is held out, or any reason for which `train_batches` raises.
    """
    corpus = as_corpus(data)
    geometry = Geometry(
        batch_size=batch_size,
        sequence_length=sequence_length,
        process_index=process_index,
        process_count=process_count,
    )
    check_fit(corpus, tokenizer, sequence_length)

    # Kept in memory, tokenized once: the same sequences are evaluated many times.
    sequences = _sequences(corpus, tokenizer, sequence_length, max_sequences)
    if not sequences:
        raise UserError(
            f"no document is held out at data.validation_fraction={corpus.config.validation_fraction}; raise it"
        )

    starts = range(0, len(sequences), batch_size)
    batches = tuple(_share(sequences[start : start + batch_size], geometry) for start in starts)
    return ValidationBatches(batches, num_sequences=len(sequences))


# Held-out sequences


def _sequences(
    corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, most: int | None
) -> list[Mapping[str, np.ndarray]]:
    """Returns the first held-out sequences, packed, each a dictionary of features."""
    # Packed already.
    if corpus.prepared:
        return _prepared_sequences(corpus, most)
    parts = [as_examples(grain.MapDataset.source(part.validation()), part, tokenizer) for part in corpus.sources]
    # Records of all sources are interleaved, so that the first `most` sequences represent the whole mixture.
    examples = grain.MapDataset.source(_Interleaved(parts))
    packed = iter(pack(examples.to_iter_dataset(READING), sequence_length, shuffle_seed=_ORDER))
    sequences = list(itertools.islice(packed, most))
    # Stops Grain's reading threads.
    packed.close()
    return sequences


def _prepared_sequences(corpus: Corpus, most: int | None) -> list[Mapping[str, np.ndarray]]:
    """Returns the first held-out sequences of prepared sources, interleaved in proportion to their sizes."""
    parts = [part.validation() for part in corpus.prepared]
    return [parts[number][index] for _, number, index in itertools.islice(_evenly(parts), most)]


def _evenly(parts: Sequence[Sized]) -> Iterator[tuple[float, int, int]]:
    """Yields (relative position, source, index) of all records, with each source spread evenly. The merge is lazy."""
    # A generator, so that only as many records are ordered as are taken.
    return heapq.merge(*(_places(number, len(part)) for number, part in enumerate(parts)))


def _places(part: int, length: int) -> Iterator[tuple[float, int, int]]:
    """Yields (relative position, source, index) for each record of one source."""
    return ((index / length, part, index) for index in range(length))


class _Interleaved:
    """Records of several sources, each spread evenly, so that every prefix has records of all sources."""

    def __init__(self, parts: Sequence[grain.MapDataset]):
        self._parts = parts
        self._order = list(_evenly(parts))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        _, number, place = self._order[index]
        return self._parts[number][place]


# Sharding by process


def _share(sequences: list[Any], geometry: Geometry) -> Batch[np.ndarray]:
    """Returns this process's sequences of one global batch, padded to the batch size."""
    # All-zero sequences are padding: their segment ids and loss mask are 0.
    padding = {name: np.zeros_like(values) for name, values in sequences[0].items()}
    whole = sequences + [padding] * (geometry.batch_size - len(sequences))
    mine = whole[geometry.process_index * geometry.sequences :][: geometry.sequences]
    return as_batch({name: np.stack([each[name] for each in mine]) for name in padding})
