"""Validation batches: the same held-out sequences for any number of processes."""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import grain
import numpy as np

from looplm_jax.config import DataConfig
from looplm_jax.data.corpus import Corpus
from looplm_jax.data.documents import Example
from looplm_jax.data.iterator import Geometry
from looplm_jax.data.packing import Batch, as_batch, pack
from looplm_jax.data.pipeline import READING, as_corpus, as_examples, check_fit
from looplm_jax.data.tokenizers.base import Tokenizer
from looplm_jax.errors import UserError

# The order is fixed, and mixed, so that the first sequences come from many documents.
_ORDER = 0


@dataclasses.dataclass(frozen=True)
class ValidationBatches:
    """Rows, for one process, of the held-out batches; can be gone through again and again."""

    batches: tuple[Batch, ...]
    num_sequences: int  # of all processes together, without the padding of the last batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
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
    """The first `max_sequences` packed held-out sequences, all by default, in batches of `batch_size`.

    Row r of global batch b is sequence `b * batch_size + r` whatever the number of processes; a process holds a
    block of neighbouring rows. Rows that fill up the last batch are padding, with `segment_ids` and `loss_mask` 0.

    Raises:
      UserError: nothing is held out, and what `train_batches` refuses.
    """
    corpus = as_corpus(data)
    geometry = Geometry(
        batch_size=batch_size,
        sequence_length=sequence_length,
        process_index=process_index,
        process_count=process_count,
    )
    check_fit(corpus, tokenizer, sequence_length)
    sequences = _sequences(corpus, tokenizer, sequence_length, max_sequences)
    if not sequences:
        raise UserError(
            f"no document is held out at data.validation_fraction={corpus.config.validation_fraction}; raise it"
        )
    starts = range(0, len(sequences), batch_size)
    batches = tuple(_share(sequences[start : start + batch_size], geometry) for start in starts)
    return ValidationBatches(batches, num_sequences=len(sequences))


def _sequences(
    corpus: Corpus, tokenizer: Tokenizer, sequence_length: int, most: int | None
) -> list[Mapping[str, np.ndarray]]:
    if corpus.prepared:
        return _rows(corpus, most)
    parts = [as_examples(grain.MapDataset.source(part.validation()), part, tokenizer) for part in corpus.parts]
    examples = grain.MapDataset.source(_Interleaved(parts))
    rows = iter(pack(examples.to_iter_dataset(READING), sequence_length, shuffle_seed=_ORDER))
    sequences = list(itertools.islice(rows, most))
    rows.close()
    return sequences


def _rows(corpus: Corpus, most: int | None) -> list[Mapping[str, np.ndarray]]:
    """The first rows of all parts, each spread evenly from the first to the last."""
    parts = [part.validation() for part in corpus.prepared]
    return [parts[number][index] for _, number, index in itertools.islice(_evenly(parts), most)]


def _evenly(parts: Sequence[Sized]) -> Iterator[tuple[float, int, int]]:
    """All places of all parts: how far into the part, which part, which index. No list of them is made."""
    return heapq.merge(*(_places(number, len(part)) for number, part in enumerate(parts)))


def _places(part: int, length: int) -> Iterator[tuple[float, int, int]]:
    return ((index / length, part, index) for index in range(length))


class _Interleaved:
    """Records of many parts, each spread evenly from the first to the last, so that a beginning holds some of all."""

    def __init__(self, parts: Sequence[grain.MapDataset]):
        self._parts = parts
        self._order = list(_evenly(parts))

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Example:
        _, number, place = self._order[index]
        return self._parts[number][place]


def _share(sequences: list[Any], geometry: Geometry) -> Batch:
    """The rows of one global batch that belong to this process."""
    padding = {name: np.zeros_like(values) for name, values in sequences[0].items()}
    rows = sequences + [padding] * (geometry.batch_size - len(sequences))
    mine = rows[geometry.process_index * geometry.rows :][: geometry.rows]
    return as_batch({name: np.stack([row[name] for row in mine]) for name in padding})
