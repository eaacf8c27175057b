"""Random draws for the tasks on one side of the validation split: one problem at a time, or many at once."""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from looplm_jax.data.splits import is_validation
from looplm_jax.errors import UserError

HELD_OUT = 1 / 16  # fraction of all problems of the tested size
_MOST_DRAWS = 1_000  # attempts per problem

P = TypeVar("P")


def generator(*key: Any) -> np.random.Generator:
    """Returns an independent random generator for each key."""
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
    for attempt in range(_MOST_DRAWS):
        problem = draw(attempt)
        if accept(problem):
            return problem

    raise _too_few(task, remedy)


def draw_again(
    drawn: Int[np.ndarray, "N W"],
    draw: Callable[[Int[np.ndarray, "n"]], Int[np.ndarray, "n W"]],
    written: Callable[[Int[np.ndarray, "W"]], str],
    suspects: Int[np.ndarray, "n"],
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
