"""Rows of a prepared corpus by index, as training reads them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from looplm_jax.data.prepared.folder import PreparedFolder
from looplm_jax.data.prepared.manifest import Manifest, Shard, read_manifest
from looplm_jax.data.prepared.row import BadRow, Segment, decode_row, decode_segments, token_type
from looplm_jax.data.prepared.shards import damaged, read_record


@dataclasses.dataclass(frozen=True)
class PreparedCorpus:
    """A folder and its manifest; no shard is opened before a row of it is read."""

    folder: PreparedFolder
    manifest: Manifest

    @property
    def train(self) -> "PreparedRows":
        """Rows to train on."""
        return PreparedRows(self.folder, self.manifest, self.manifest.train)

    @property
    def validation(self) -> "PreparedRows":
        """Rows that are held out."""
        return PreparedRows(self.folder, self.manifest, self.manifest.validation)


class PreparedRows:
    """The rows of many shards, by index; each read opens the shard it needs, if it is not open."""

    def __init__(self, folder: PreparedFolder, manifest: Manifest, shards: Sequence[Shard]):
        self._folder, self._shards = folder, shards
        self._ends = np.cumsum([shard.rows for shard in shards], dtype=np.int64)
        self._length = manifest.plan.sequence_length
        self._vocab_size = manifest.plan.vocab_size
        self._tokens = token_type(self._vocab_size)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        """A row as features, named as those that Grain packs. Raises UserError where a shard is damaged."""
        shard, row = self._place(index)
        try:
            features = decode_row(read_record(self._folder, shard, row), self._length, self._tokens)
        except BadRow as problem:
            raise damaged(self._folder, shard, f"row {row}: {problem}") from None
        highest = max(int(features["tokens"].max()), int(features["targets"].max()))
        if highest >= self._vocab_size:
            raise damaged(self._folder, shard, f"row {row}: id {highest} is not in a vocabulary of {self._vocab_size}")
        return features

    def segments(self, index: int) -> list[Segment]:
        """The segments of a row."""
        return decode_segments(read_record(self._folder, *self._place(index)), self._tokens)

    def __repr__(self) -> str:
        return f"PreparedRows({str(self._folder.path)!r}, rows={len(self)})"

    def _place(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._shards[shard], index - (int(self._ends[shard - 1]) if shard else 0)


def open_prepared(path: str) -> PreparedCorpus:
    """A prepared corpus; only its manifest is read. Raises UserError where there is none, or it is damaged."""
    folder = PreparedFolder(path)
    return PreparedCorpus(folder, read_manifest(folder))
