"""What a synthetic task offers."""

import dataclasses
from typing import Protocol, runtime_checkable

from looplm_jax.data.documents import Example
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer

_ENDLESS = 2**48


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

    def train_example(self, seed: int, index: int) -> Example:
        """Problem `index` of the training stream of a seed."""

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
