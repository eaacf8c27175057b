"""What a synthetic task offers."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32

from looplm_jax.data.documents import Example
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer

_ENDLESS = 2**48


@dataclasses.dataclass(frozen=True, eq=False)
class Problems:
    """N problems, the tokens of one after those of the other. `loss_mask` says which of these are targets."""

    tokens: Int32[np.ndarray, "P"]
    loss_mask: Bool[np.ndarray, "P"]
    lengths: Int[np.ndarray, "N"]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Problems":
        """Returns examples that were drawn one by one."""
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
        """Returns problems that were drawn side by side. `used` says which columns of its row a problem has."""
        return cls(tokens[used].astype(np.int32), loss_mask[used], used.sum(axis=1))

    @classmethod
    def joined(cls, parts: Sequence["Problems"], order: Int[np.ndarray, "N"]) -> "Problems":
        """Returns the problems of all parts in an order."""
        tokens, mask, lengths = (
            np.concatenate([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(cls)
        )
        chosen = lengths[order]
        starts = np.cumsum(lengths) - lengths
        places = np.repeat(starts[order] - (np.cumsum(chosen) - chosen), chosen) + np.arange(len(tokens))
        return cls(tokens[places], mask[places], chosen)


@runtime_checkable
class Task(Protocol):
    """Problems as pure functions of a seed and an index."""

    @property
    def tokenizer(self) -> SymbolTokenizer:
        """The task's vocabulary."""

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest problem."""

    @property
    def validation_items(self) -> int:
        """Number of held-out problems."""

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Problems `start` to `start + count` of the training stream of a seed: a pure function of all three."""

    def train_example(self, seed: int, index: int) -> Example:
        """Problem `index` of the stream of a seed that is drawn one problem at a time."""

    def validation_example(self, index: int) -> Example:
        """Held-out problem `index`, one that no training stream can hold."""


@dataclasses.dataclass(frozen=True)
class TrainStream:
    """The training problems of one seed, by index, practically without end."""

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
