"""The interface of all synthetic tasks, and batches of their problems."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32

from looplm_jax.data.documents import Example
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer

_ENDLESS = 2**48  # nominal length of a training stream


@dataclasses.dataclass(frozen=True, eq=False)
class Problems:
    """N problems, concatenated into arrays of P tokens. `loss_mask` is true for targets."""

    tokens: Int32[np.ndarray, "P"]
    loss_mask: Bool[np.ndarray, "P"]
    lengths: Int[np.ndarray, "N"]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Problems":
        """Returns examples that were drawn one at a time."""
        examples = list(examples)
        return cls(
            np.concatenate([example.tokens for example in examples]),
            np.concatenate([example.loss_mask for example in examples]),
            np.array([len(example.tokens) for example in examples]),
        )

    @classmethod
    def of_columns(
        cls, tokens: Int[np.ndarray, "N W"], loss_mask: Bool[np.ndarray, "N W"], used: Bool[np.ndarray, "N W"]
    ) -> "Problems":
        """Returns N problems that were drawn as rows of W columns.

        `used` is true for the columns that a problem occupies.
        """
        return cls(tokens[used].astype(np.int32), loss_mask[used], used.sum(axis=1))

    @classmethod
    def joined(cls, parts: Sequence["Problems"], order: Int[np.ndarray, "N"]) -> "Problems":
        """Returns the problems of several batches in the given order, a permutation of all their indices."""
        tokens, mask, lengths = (
            np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)
        )

        # Index of each output token in the concatenated input: the start of its problem plus its offset in the problem.
        chosen = lengths[order]
        starts = np.cumsum(lengths) - lengths
        places = np.repeat(starts[order] - (np.cumsum(chosen) - chosen), chosen) + np.arange(len(tokens))
        return cls(tokens[places], mask[places], chosen)


@runtime_checkable
class Task(Protocol):
    """A synthetic task, with problems that are pure functions of a seed and an index."""

    @property
    def tokenizer(self) -> SymbolTokenizer:
        """The vocabulary of the task."""

    @property
    def max_tokens(self) -> int:
        """The number of tokens of the longest problem."""

    @property
    def validation_items(self) -> int:
        """The number of held-out problems."""

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns training problems `start` to `start + count` of a seed: a pure function of all three arguments."""

    def train_example(self, seed: int, index: int) -> Example:
        """Returns problem `index` of the training stream of a seed that draws one problem at a time."""

    def validation_example(self, index: int) -> Example:
        """Returns held-out problem `index`, which no training stream can contain."""


@dataclasses.dataclass(frozen=True)
class TrainStream:
    """The training problems of one seed, by index, in practically endless number."""

    task: Task
    seed: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> Example:
        return self.task.train_example(self.seed, index)


@dataclasses.dataclass(frozen=True)
class ValidationItems:
    """The held-out problems, by index."""

    task: Task

    def __len__(self) -> int:
        return self.task.validation_items

    def __getitem__(self, index: int) -> Example:
        return self.task.validation_example(index)
