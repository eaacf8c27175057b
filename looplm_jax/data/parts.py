"""The parts of a mixture: texts in files, tasks, and prepared rows."""

import dataclasses
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int64

from looplm_jax.config import SourceConfig
from looplm_jax.data.documents import Document, Example
from looplm_jax.data.prepared.manifest import Manifest
from looplm_jax.data.prepared.reading import PreparedCorpus
from looplm_jax.data.sources import FileSource
from looplm_jax.data.tasks.base import Task, TrainStream, ValidationItems

_HELD_OUT_ORDER = 0  # mixed, so that the first held-out rows come from many files


class Records(Protocol):
    """Documents or examples by index."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Document | Example:
        """A record."""


class Part(Protocol):
    """One source of the mixture."""

    @property
    def config(self) -> SourceConfig:
        """Where it comes from, and its weight."""

    def train(self, seed: int) -> grain.MapDataset:
        """Records to train on, shuffled anew in every epoch, without end."""

    def validation(self) -> "Records":
        """Held-out records, always in the same order."""

    @property
    def train_documents(self) -> int:
        """Documents of one epoch; 0 where there are no epochs."""


@dataclasses.dataclass(frozen=True)
class TextPart:
    """Documents in files."""

    config: SourceConfig
    source: FileSource
    train_indices: Int64[np.ndarray, "train"]
    validation_indices: Int64[np.ndarray, "validation"]

    def train(self, seed: int) -> grain.MapDataset:
        """The documents that are not held out."""
        documents = Subset(self.source, self.train_indices)
        return grain.MapDataset.source(documents).shuffle(seed).repeat()

    def validation(self) -> "Subset":
        """The documents that are held out."""
        return Subset(self.source, self.validation_indices)

    @property
    def train_documents(self) -> int:
        """Documents that are not held out."""
        return len(self.train_indices)


@dataclasses.dataclass(frozen=True)
class TaskPart:
    """Problems of a synthetic task, drawn when they are asked for."""

    config: SourceConfig
    task: Task
    train_documents: int = 0

    def train(self, seed: int) -> grain.MapDataset:
        """The stream of a seed."""
        return grain.MapDataset.source(TrainStream(self.task, seed))

    def validation(self) -> ValidationItems:
        """Problems that no training stream holds."""
        return ValidationItems(self.task)


@dataclasses.dataclass(frozen=True)
class PreparedPart:
    """Rows that were tokenised and packed before."""

    config: SourceConfig
    corpus: PreparedCorpus

    def train(self, seed: int) -> grain.MapDataset:
        """The rows that are not held out. Their order is a function of the index, so no list of it is kept."""
        return grain.MapDataset.source(self.corpus.train).shuffle(seed).repeat()

    def validation(self) -> grain.MapDataset:
        """The rows that are held out."""
        return grain.MapDataset.source(self.corpus.validation).shuffle(_HELD_OUT_ORDER)

    @property
    def manifest(self) -> Manifest:
        """What the rows are."""
        return self.corpus.manifest

    @property
    def train_documents(self) -> int:
        """Documents in the rows to train on."""
        return sum(shard.documents for shard in self.manifest.train)


@dataclasses.dataclass(frozen=True)
class Subset:
    """The documents of a source at some indices."""

    source: FileSource
    indices: Int64[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:
        return self.source[int(self.indices[index])]
