"""Random access to the sequences of a prepared corpus, and verification that its files are intact."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from looplm_jax.corpus._format import Manifest, PreparedFolder, Shard, read_manifest, read_tokenizer
from looplm_jax.corpus._shards import (
    BadSequence,
    Segment,
    check_edges,
    check_shard,
    damaged,
    decode_segments,
    decode_sequence,
    read_record,
    token_type,
)
from looplm_jax.errors import UserError

# Whole shards, each of which is read at the speed of the disk.
_READS_AT_ONCE = 4
# A few kilobytes of each file, dominated by latency.
_EDGES_AT_ONCE = 16
_BYTES_AT_START = 2**30  # bytes of shards that are checked completely at every start


@dataclasses.dataclass(frozen=True)
class PreparedCorpus:
    """A folder and its manifest. Shards are opened when a sequence in them is first read."""

    folder: PreparedFolder
    manifest: Manifest

    @property
    def train(self) -> "PreparedSequences":
        """The training sequences."""
        return PreparedSequences(self.folder, self.manifest, self.manifest.train)

    @property
    def validation(self) -> "PreparedSequences":
        """The held-out sequences."""
        return PreparedSequences(self.folder, self.manifest, self.manifest.validation)


class PreparedSequences:
    """The sequences of several shards, by index. A read opens the shard if necessary."""

    def __init__(self, folder: PreparedFolder, manifest: Manifest, shards: Sequence[Shard]):
        self._folder, self._shards = folder, shards
        # The end of each shard in the numbering of all sequences, exclusive.
        self._ends = np.cumsum([shard.rows for shard in shards], dtype=np.int64)
        self._length = manifest.plan.sequence_length
        self._vocab_size = manifest.plan.vocab_size
        self._tokens = token_type(self._vocab_size)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """Returns a sequence as features of shape [S], named as Grain names packed features.

        Raises:
          UserError: the shard is damaged or missing, or has a token id outside the vocabulary.
        """
        shard, row = self._place(index)
        try:
            features = decode_sequence(read_record(self._folder, shard, row), self._length, self._tokens)
        except BadSequence as problem:
            raise damaged(self._folder, shard, f"sequence {row}: {problem}") from None

        # JAX does not raise an error for an id outside the vocabulary.
        highest = max(int(features["tokens"].max()), int(features["targets"].max()))
        if highest >= self._vocab_size:
            raise damaged(
                self._folder, shard, f"sequence {row}: id {highest} is not in a vocabulary of {self._vocab_size}"
            )
        return features

    def segments(self, index: int) -> list[Segment]:
        """Returns the segments of a sequence."""
        return decode_segments(read_record(self._folder, *self._place(index)), self._tokens)

    def __repr__(self) -> str:
        return f"PreparedSequences({str(self._folder.path)!r}, sequences={len(self)})"

    def _place(self, index: int) -> tuple[Shard, int]:
        """Returns the shard of a sequence and its index in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        # `right`, because an index equal to an end belongs to the next shard.
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - (int(self._ends[shard - 1]) if shard else 0)


def open_prepared(path: str) -> PreparedCorpus:
    """Opens a prepared corpus; only its manifest is read. Raises UserError if there is none, or it is damaged."""
    folder = PreparedFolder(path)
    return PreparedCorpus(folder, read_manifest(folder))


# Verification: a quick check at every start, or a check of every byte


def verify(corpus: PreparedCorpus) -> list[str]:
    """Returns one line for each file that is damaged or missing. Every shard is read completely."""
    folder, shards = corpus.folder, corpus.manifest.shards
    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        found = zip(shards, threads.map(functools.partial(check_shard, folder), shards), strict=True)
        lines = [str(damaged(folder, shard, why)) for shard, why in found if why is not None]
    try:
        read_tokenizer(folder, corpus.manifest)
    except UserError as error:
        lines.append(str(error))
    return lines


def check_at_start(corpora: Sequence[PreparedCorpus]) -> None:
    """Checks the size and the edges of every shard, and all bytes of about a gigabyte of shards.

    A mixture of up to a gigabyte is therefore checked completely, and the time for a larger one grows only with the
    number of its files.

    Raises:
      UserError: a shard is missing, damaged, or from another preparation.
    """
    shards = [(corpus, shard) for corpus in corpora for shard in corpus.manifest.shards]
    _refuse(shards, check_edges, _EDGES_AT_ONCE)

    # Evenly spaced shards that add up to about _BYTES_AT_START; all of them if the corpus is smaller.
    step = max(-(-sum(shard.bytes for _, shard in shards) // _BYTES_AT_START), 1)
    _refuse(shards[::step], check_shard, _READS_AT_ONCE)


def _refuse(
    shards: Sequence[tuple[PreparedCorpus, Shard]], check: Callable[[PreparedFolder, Shard], str | None], at_once: int
) -> None:
    """Applies a check to shards concurrently and raises UserError for the first one that fails."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as threads:
        found = threads.map(lambda pair: check(pair[0].folder, pair[1]), shards)
        for (corpus, shard), why in zip(shards, found, strict=True):
            if why is not None:
                raise damaged(corpus.folder, shard, why)
