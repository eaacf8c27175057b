"""The interface of all synthetic tasks, batches of their problems, and random draws on one side of the split."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Integer

from looplm_jax.data._documents import is_validation
from looplm_jax.data._examples import Example
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError

_ENDLESS = 2**48  # nominal length of a training stream

HELD_OUT = 1 / 16  # fraction of all problems of the tested size
_MOST_DRAWS = 1_000  # attempts per problem

P = TypeVar("P")


@dataclasses.dataclass(frozen=True, eq=False)
class Problems:
    """N problems, concatenated into arrays of P tokens. `loss_mask` is true for targets."""

    tokens: Int32[np.ndarray, "P"]
    loss_mask: Bool[np.ndarray, "P"]
    lengths: Integer[np.ndarray, "N"]

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
        cls, tokens: Integer[np.ndarray, "N W"], loss_mask: Bool[np.ndarray, "N W"], used: Bool[np.ndarray, "N W"]
    ) -> "Problems":
        """Returns N problems that were drawn as rows of W columns.

        `used` is true for the columns that a problem occupies.
        """
        return cls(tokens[used].astype(np.int32), loss_mask[used], used.sum(axis=1))

    @classmethod
    def joined(cls, parts: Sequence["Problems"], order: Integer[np.ndarray, "N"]) -> "Problems":
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


# Random draws: one problem at a time, or many at once


def generator(*key: Any) -> np.random.Generator:
    """Returns an independent random generator for each key."""
    # A hash, so that keys of any length and kind give independent seeds.
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def is_held_out(problem: str) -> bool:
    """Whether a problem, given as text, is held out for validation. This does not depend on any seed."""
    return is_validation(problem, HELD_OUT)


def first_draw(draw: Callable[[int], P], accept: Callable[[P], bool], task: str, remedy: str) -> P:
    """Returns the first accepted problem of a sequence of draws.

    Args:
      draw: returns the problem of an attempt, given its number.
      accept: decides whether a problem is on the requested side of the split.
      task: the name of the task, for the error message.
      remedy: the advice in the error message.

    Raises:
      UserError: no draw is accepted, because the task has too few problems to hold some out.
    """
    # Bounded, because a task may have no problem on this side of the split.
    for attempt in range(_MOST_DRAWS):
        problem = draw(attempt)
        if accept(problem):
            return problem

    raise _too_few(task, remedy)


def draw_again(
    drawn: Integer[np.ndarray, "N W"],
    draw: Callable[[Integer[np.ndarray, "n"]], Integer[np.ndarray, "n W"]],
    written: Callable[[Integer[np.ndarray, "W"]], str],
    suspects: Integer[np.ndarray, "n"],
    task: str,
    remedy: str,
) -> None:
    """Redraws rows of `drawn`, in place, until none is a held-out problem.

    Args:
      drawn: N problems, one per row.
      draw: draws new problems for the given rows.
      written: returns the text of a problem, for `is_held_out`.
      suspects: indices of the rows that may be held out.
      task: the name of the task, for the error message.
      remedy: the advice in the error message.

    Raises:
      UserError: a problem cannot be drawn, because the task has too few problems to hold some out.
    """
    for _ in range(_MOST_DRAWS):
        held_out = [is_held_out(written(row)) for row in drawn[suspects]]
        # Only rows that were just redrawn are checked again.
        suspects = suspects[np.array(held_out, bool)]
        if len(suspects) == 0:
            return

        drawn[suspects] = draw(suspects)

    raise _too_few(task, remedy)


def _too_few(task: str, remedy: str) -> UserError:
    """Returns the error for a task with too few problems."""
    return UserError(f"{task} has too few problems to hold some out; {remedy}")
