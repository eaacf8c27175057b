"""A corpus: all sources of a `DataConfig`, opened, validated, and split into training and validation documents."""

import dataclasses
import functools
import glob
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int64

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.corpus._format import Manifest, is_prepared, read_tokenizer
from looplm_jax.corpus._reader import PreparedCorpus, check_at_start, open_prepared
from looplm_jax.data._documents import Document, split_documents
from looplm_jax.data._examples import Example
from looplm_jax.data.sources import FileSource, Inputs, find_inputs, open_files, summarize
from looplm_jax.data.sources import _huggingface as huggingface
from looplm_jax.data.tasks._base import Task, TrainStream, ValidationItems
from looplm_jax.data.tasks._registry import is_task, make_task
from looplm_jax.data.tokenizers._base import Tokenizer
from looplm_jax.errors import UserError

_HELD_OUT_ORDER = 0  # seed of the fixed order, shuffled so that the first held-out sequences come from many files


# Interfaces


@runtime_checkable
class Records(Protocol):
    """Random access to documents or examples."""

    def __len__(self) -> int:
        """Returns the number of records."""

    def __getitem__(self, index: int) -> Document | Example:
        """Returns the record at an index."""


@runtime_checkable
class MixtureSource(Protocol):
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
class TextSource:
    """A source of documents in files, split into training and validation by index."""

    config: SourceConfig
    source: FileSource
    train_indices: Int64[np.ndarray, "train"]
    validation_indices: Int64[np.ndarray, "validation"]

    def train(self, seed: int) -> grain.MapDataset:
        """Returns the training documents, reshuffled in every epoch."""
        # Grain shuffles the indices; the documents themselves are read when they are needed.
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
class TaskSource:
    """A synthetic task, whose problems are generated on demand."""

    config: SourceConfig
    task: Task
    train_documents: int = 0

    def train(self, seed: int) -> grain.MapDataset:
        """Returns the training problems of a seed."""
        # Neither shuffled nor repeated: the stream is random and endless by itself.
        return grain.MapDataset.source(TrainStream(self.task, seed))

    def validation(self) -> ValidationItems:
        """Returns the held-out problems, which no training stream contains."""
        return ValidationItems(self.task)


@dataclasses.dataclass(frozen=True)
class PreparedSource:
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


# Corpora


@dataclasses.dataclass(frozen=True)
class Corpus:
    """All opened sources of a mixture, grouped by kind, and the configuration they were opened from."""

    config: DataConfig
    texts: tuple[TextSource, ...]
    tasks: tuple[TaskSource, ...]
    prepared: tuple[PreparedSource, ...] = ()

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        """All sources of the mixture. A corpus has either prepared sources or others, never both."""
        return self.texts + self.tasks + self.prepared

    @property
    def train_documents(self) -> int:
        """The number of text documents in one training epoch."""
        return sum(part.train_documents for part in self.texts + self.prepared)

    @property
    def validation_documents(self) -> int:
        """The number of text documents held out for validation."""
        # Tasks have no documents, and as many held-out problems as are asked for.
        texts = sum(len(part.validation_indices) for part in self.texts)
        return texts + sum(shard.documents for part in self.prepared for shard in part.manifest.validation)

    @property
    def skipped(self) -> int:
        """The number of bad records that were skipped."""
        return sum(part.source.skipped for part in self.texts)

    @property
    def digest(self) -> str:
        """A hex digest that changes when any text document changes, or when their order changes."""
        # The key of a document is a hash of its text; the digest of a manifest covers all of its shards.
        texts = [part.source.keys.tobytes() for part in self.texts]
        prepared = [part.manifest.digest.encode() for part in self.prepared]
        return hashlib.blake2b(b"".join(texts + prepared), digest_size=8).hexdigest()

    @functools.cached_property
    def own_tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the tasks or the prepared sources. None for text sources, which work with any tokenizer."""
        # The sources were checked to share one tokenizer, so the first one is used.
        if self.prepared:
            return read_tokenizer(self.prepared[0].corpus.folder, self.prepared[0].manifest)
        return self.tasks[0].task.tokenizer if self.tasks else None


# Opening


def open_corpus(data: DataConfig, say: Callable[[str], object] | None = None) -> Corpus:
    """Opens, validates and splits every source of a configuration.

    Each text file is read once, from beginning to end. Of a prepared corpus, only the manifest and a part of each shard
    are read (see `check_at_start`).

    Args:
      data: the sources and the options for reading them.
      say: called before reading with one line that lists the numbers of files to read and files left out.

    Returns:
      The corpus. It can be shared by several streams.

    Raises:
      UserError: there is no source, a source has bad data (see `open_files`), a task is unknown, one side of the
        validation split is empty, or the sources cannot share a tokenizer.
    """
    if not data.sources:
        raise UserError("data.sources is empty; say what to train on, for example --data 'folder/*.jsonl'")

    prepared = _open_prepared(data)
    if prepared:
        return Corpus(config=data, texts=(), tasks=(), prepared=prepared)

    sources = [source for source in data.sources if not is_task(source.path)]
    located = [dataclasses.replace(source, path=locate(data.root, source.path)) for source in sources]
    # All inputs are found before any is read, so that `say` can announce them.
    found = [find_inputs(source.path, source, data.limits) for source in located]
    if say is not None and found:
        say(summarize(found))

    texts = tuple(itertools.starmap(functools.partial(_open_text, data), zip(sources, located, found, strict=True)))
    tasks = tuple(TaskSource(source, make_task(source.path)) for source in data.sources if is_task(source.path))

    _check_split(data, texts)
    _check_one_vocabulary(texts, tasks)
    return Corpus(config=data, texts=texts, tasks=tasks)


def locate(root: str, path: str) -> str:
    """Returns the path at which a source is opened.

    This is a path below `root`, unless the source's path is absolute, a URL or a Hugging Face dataset.
    """
    if not root or "://" in path or path.startswith(("/", "~", huggingface.PREFIX)):
        return path
    if "://" not in root and glob.has_magic(path):
        root = glob.escape(root)  # only the source's own path is a pattern; the root is literal
    return f"{root.rstrip('/')}/{path}"


def _open_text(data: DataConfig, config: SourceConfig, located: SourceConfig, files: Inputs) -> TextSource:
    """Opens a text source and splits it. Raises UserError if no document is left for training."""
    source = open_files(located, on_bad_record=data.on_bad_record, files=files)
    # By the hash of each text, so that a document stays on its side when files are added, and its copies with it.
    split = split_documents(source.keys, data.validation_fraction)
    if len(split.train) == 0:
        raise UserError(
            f"{config.path}: all {len(source)} documents are held out for validation; "
            "lower data.validation_fraction, or give more documents"
        )
    return TextSource(config, source, split.train, split.validation)


def _open_prepared(data: DataConfig) -> tuple[PreparedSource, ...]:
    """Returns the prepared sources, or an empty tuple if no source is prepared.

    Raises:
      UserError: only some sources are prepared, or they do not match in tokenizer or sequence length.
    """
    # Tasks are never prepared; they are among `others` below.
    places = [(source, locate(data.root, source.path)) for source in data.sources if not is_task(source.path)]
    found = [(source, path) for source, path in places if is_prepared(path)]
    if not found:
        return ()

    others = [source.path for source in data.sources if source not in dict(found)]
    if others:
        raise UserError(
            f"{found[0][0].path!r} is prepared and {others[0]!r} is not; a mixture is all prepared or none: "
            "prepare the other with `looplm tokenize`"
        )

    sources = tuple(PreparedSource(source, open_prepared(path)) for source, path in found)

    # Sequences of all sources are mixed in one batch, so all must match.
    for part in sources[1:]:
        _check_alike(sources[0], part)
    check_at_start([part.corpus for part in sources])

    # Preparation has decided what is held out; the fraction only says whether the run needs any.
    if data.validation_fraction > 0 and not any(part.manifest.validation for part in sources):
        raise UserError(
            "no sequence of the prepared sources is held out; prepare one with --validation-fraction, or set "
            "data.validation_fraction to 0"
        )

    return sources


# Checks


def _check_alike(first: PreparedSource, other: PreparedSource) -> None:
    """Raises UserError if two prepared sources differ in tokenizer or sequence length."""
    ours, theirs = first.manifest.plan, other.manifest.plan
    if ours.tokenizer != theirs.tokenizer:
        raise UserError(
            f"{first.config.path!r} and {other.config.path!r} are prepared with different tokenizers; "
            "prepare both with the same"
        )
    if ours.sequence_length != theirs.sequence_length:
        raise UserError(
            f"{first.config.path!r} is prepared in sequences of {ours.sequence_length} and {other.config.path!r} of "
            f"{theirs.sequence_length}; prepare both for the same --sequence-length"
        )


def _check_split(data: DataConfig, texts: Sequence[TextSource]) -> None:
    """Raises UserError if validation is requested and no document is held out."""
    if texts and data.validation_fraction > 0 and not any(len(part.validation_indices) for part in texts):
        documents = sum(part.train_documents for part in texts)
        raise UserError(
            f"none of the {documents} documents is held out at data.validation_fraction={data.validation_fraction}; "
            "raise it, give more documents, or set it to 0"
        )


def _check_one_vocabulary(texts: Sequence[TextSource], tasks: Sequence[TaskSource]) -> None:
    """Raises UserError if a task is mixed with text, or with a task of another vocabulary."""
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
