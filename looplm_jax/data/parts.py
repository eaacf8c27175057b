"""The sources of a mixture: text files, synthetic tasks, and prepared sequences."""

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

_HELD_OUT_ORDER = 0  # seed of the fixed order, shuffled so that the first held-out sequences come from many files


# Interfaces


class Records(Protocol):
    """Random access to documents or examples."""

    def __len__(self) -> int:
        """Returns the number of records."""

    def __getitem__(self, index: int) -> Document | Example:
        """Returns the record at an index."""


class Part(Protocol):
    """One source of the mixture."""

    @property
    def config(self) -> SourceConfig:
        """The configuration of the source, with its path and weight."""

    def train(self, seed: int) -> grain.MapDataset:
        """Returns an endless dataset of training records, reshuffled in every epoch."""

    def validation(self) -> "Records":
        """Returns the held-out records, always in the same order."""

    @property
    def train_documents(self) -> int:
        """The number of documents in one epoch, or 0 if the source has no epochs."""


# Sources


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A source of documents in files, split into training and validation by index."""

    config: SourceConfig
    source: FileSource
    train_indices: Int64[np.ndarray, "train"]
    validation_indices: Int64[np.ndarray, "validation"]

    def train(self, seed: int) -> grain.MapDataset:
        """Returns the training documents, reshuffled in every epoch."""
        documents = Subset(self.source, self.train_indices)
        return grain.MapDataset.source(documents).shuffle(seed).repeat()

    def validation(self) -> "Subset":
        """Returns the held-out documents."""
        return Subset(self.source, self.validation_indices)

    @property
    def train_documents(self) -> int:
        """The number of training documents."""
        return len(self.train_indices)


@dataclasses.dataclass(frozen=True)
class TaskPart:
    """A synthetic task, whose problems are generated on demand."""

    config: SourceConfig
    task: Task
    train_documents: int = 0

    def train(self, seed: int) -> grain.MapDataset:
        """Returns the training problems of a seed."""
        return grain.MapDataset.source(TrainStream(self.task, seed))

    def validation(self) -> ValidationItems:
        """Returns the held-out problems, which no training stream contains."""
        return ValidationItems(self.task)


@dataclasses.dataclass(frozen=True)
class PreparedPart:
    """A source of sequences that were tokenized and packed beforehand with `looplm tokenize`."""

    config: SourceConfig
    corpus: PreparedCorpus

    def train(self, seed: int) -> grain.MapDataset:
        """Returns the training sequences, reshuffled in every epoch.

        Grain computes the order from the index, so no permutation is stored.
        """
        return grain.MapDataset.source(self.corpus.train).shuffle(seed).repeat()

    def validation(self) -> grain.MapDataset:
        """Returns the held-out sequences."""
        return grain.MapDataset.source(self.corpus.validation).shuffle(_HELD_OUT_ORDER)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the prepared corpus."""
        return self.corpus.manifest

    @property
    def train_documents(self) -> int:
        """The number of documents in the training sequences."""
        return sum(shard.documents for shard in self.manifest.train)


@dataclasses.dataclass(frozen=True)
class Subset:
    """The documents of a source at the given N indices."""

    source: FileSource
    indices: Int64[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Document:
        return self.source[int(self.indices[index])]
