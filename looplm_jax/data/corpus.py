"""The sources of a configuration, opened, checked and split."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np
from jaxtyping import Int64

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.data.examples import Example
from looplm_jax.data.sources import FileSource, open_files
from looplm_jax.data.splits import split_documents
from looplm_jax.data.tasks.base import Task, TrainStream, ValidationItems
from looplm_jax.data.tasks.registry import is_task, make_task
from looplm_jax.data.tokenizers.base import Tokenizer
from looplm_jax.errors import UserError


class Records(Protocol):
    """Documents or examples by index."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> str | Example:
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
class Subset:
    """The documents of a source at some indices."""

    source: FileSource
    indices: Int64[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> str:
        return self.source[int(self.indices[index])]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The parts of a mixture, and the configuration they were opened from."""

    config: DataConfig
    texts: tuple[TextPart, ...]
    tasks: tuple[TaskPart, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts."""
        return self.texts + self.tasks

    @property
    def train_documents(self) -> int:
        """Documents of text in one epoch."""
        return sum(part.train_documents for part in self.texts)

    @property
    def validation_documents(self) -> int:
        """Documents of text that are held out."""
        return sum(len(part.validation_indices) for part in self.texts)

    @property
    def skipped(self) -> int:
        """Bad records that were left out."""
        return sum(part.source.skipped for part in self.texts)

    @property
    def digest(self) -> str:
        """Changes when any document of text changes, or their order."""
        return hashlib.blake2b(b"".join(part.source.keys.tobytes() for part in self.texts), digest_size=8).hexdigest()

    @property
    def own_tokenizer(self) -> Tokenizer | None:
        """The vocabulary that the tasks come with; None for text, which takes any tokeniser."""
        return self.tasks[0].task.tokenizer if self.tasks else None


def open_corpus(data: DataConfig) -> Corpus:
    """Open every source of a configuration and split its documents. Every file is read once.

    Raises:
      UserError: no source, bad data (see `open_files`), an unknown task, an empty part of the split, or sources that
        cannot share a tokeniser.
    """
    if not data.sources:
        raise UserError("data.sources is empty; say what to train on, for example --data 'folder/*.jsonl'")
    texts = tuple(_open_text(data, source) for source in data.sources if not is_task(source.path))
    tasks = tuple(TaskPart(source, make_task(source.path)) for source in data.sources if is_task(source.path))
    _check_split(data, texts)
    _check_one_vocabulary(texts, tasks)
    return Corpus(config=data, texts=texts, tasks=tasks)


def locate(root: str, path: str) -> str:
    """A source's path as it is opened: below `root`, unless it is absolute or a URL."""
    if not root or "://" in path or path.startswith(("/", "~")):
        return path
    return f"{root.rstrip('/')}/{path}"


def _open_text(data: DataConfig, config: SourceConfig) -> TextPart:
    path = locate(data.root, config.path)
    source = open_files(path, text_key=config.text_key, on_bad_record=data.on_bad_record)
    split = split_documents(source.keys, data.validation_fraction)
    if len(split.train) == 0:
        raise UserError(
            f"{config.path}: all {len(source)} documents are held out for validation; "
            "lower data.validation_fraction, or give more documents"
        )
    return TextPart(config, source, split.train, split.validation)


def _check_split(data: DataConfig, texts: Sequence[TextPart]) -> None:
    if texts and data.validation_fraction > 0 and not any(len(part.validation_indices) for part in texts):
        documents = sum(part.train_documents for part in texts)
        raise UserError(
            f"none of the {documents} documents is held out at data.validation_fraction={data.validation_fraction}; "
            "raise it, give more documents, or set it to 0"
        )


def _check_one_vocabulary(texts: Sequence[TextPart], tasks: Sequence[TaskPart]) -> None:
    if tasks and texts:
        raise UserError(
            f"the task {tasks[0].config.path!r} has a vocabulary of its own and cannot be mixed with "
            f"{texts[0].config.path!r}; train on one of them"
        )
    for other in tasks[1:]:
        if other.task.tokenizer.fingerprint != tasks[0].task.tokenizer.fingerprint:
            raise UserError(
                f"the tasks {tasks[0].config.path!r} and {other.config.path!r} have different vocabularies "
                "and cannot be mixed; train on one of them"
            )
