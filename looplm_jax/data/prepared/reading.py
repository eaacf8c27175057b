"""Random access to the sequences of a prepared corpus, for training."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import Manifest, Shard, read_manifest
from looplm_jax.data.prepared.row import BadRow, Segment, decode_row, decode_segments, token_type
from looplm_jax.data.prepared.shards import damaged, read_record


@dataclasses.dataclass(frozen=True)
class PreparedCorpus:
    """A folder and its manifest. Shards are opened when a sequence in them is first read."""

    folder: PreparedFolder
    manifest: Manifest

    @property
    def train(self) -> "PreparedRows":
        """The training sequences."""
        return PreparedRows(self.folder, self.manifest, self.manifest.train)

    @property
    def validation(self) -> "PreparedRows":
        """The held-out sequences."""
        return PreparedRows(self.folder, self.manifest, self.manifest.validation)


class PreparedRows:
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
            features = decode_row(read_record(self._folder, shard, row), self._length, self._tokens)
        except BadRow as problem:
            raise damaged(self._folder, shard, f"row {row}: {problem}") from None

        # JAX does not raise an error for an id outside the vocabulary.
        highest = max(int(features["tokens"].max()), int(features["targets"].max()))
        if highest >= self._vocab_size:
            raise damaged(self._folder, shard, f"row {row}: id {highest} is not in a vocabulary of {self._vocab_size}")
        return features

    def segments(self, index: int) -> list[Segment]:
        """Returns the segments of a sequence."""
        return decode_segments(read_record(self._folder, *self._place(index)), self._tokens)

    def __repr__(self) -> str:
        return f"PreparedRows({str(self._folder.path)!r}, rows={len(self)})"

    def _place(self, index: int) -> tuple[Shard, int]:
        """Returns the shard of a sequence and its index in the shard."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - (int(self._ends[shard - 1]) if shard else 0)


def open_prepared(path: str) -> PreparedCorpus:
    """Opens a prepared corpus; only its manifest is read. Raises UserError if there is none, or it is damaged."""
    folder = PreparedFolder(path)
    return PreparedCorpus(folder, read_manifest(folder))
