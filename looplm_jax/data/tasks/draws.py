"""Random draws of the tasks, on the asked side of the split: a problem at a time, or many at once."""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int

from looplm_jax.data.splits import is_validation
from looplm_jax.errors import UserError

HELD_OUT = 1 / 16  # share of all problems of the tested size
_MOST_DRAWS = 1_000

P = TypeVar("P")


def generator(*key: Any) -> np.random.Generator:
    """An independent generator for each key."""
    digest = hashlib.blake2b(":".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def is_held_out(problem: str) -> bool:
    """Whether a problem, written out, belongs to validation, whatever the seed."""
    return is_validation(problem, HELD_OUT)


def first_draw(draw: Callable[[int], P], accept: Callable[[P], bool], task: str, remedy: str) -> P:
    """The first of a problem's own sequence of draws, by attempt, that is accepted.

    Raises:
      UserError: none is; the task has too few problems to hold some out.
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
    """Draws rows of `drawn` again, in place, until none is held out.

    Args:
      drawn: problems, one a row.
      draw: draws the rows at some places anew.
      written: a row as it is written out for `is_held_out`.
      suspects: the rows that may be held out.
      task: its name, for the message.
      remedy: what its user can do.

    Raises:
      UserError: a problem cannot be drawn; the task has too few to hold some out.
    """
    for _ in range(_MOST_DRAWS):
        held_out = [is_held_out(written(row)) for row in drawn[suspects]]
        suspects = suspects[np.array(held_out, bool)]
        if len(suspects) == 0:
            return
        drawn[suspects] = draw(suspects)
    raise _too_few(task, remedy)


def _too_few(task: str, remedy: str) -> UserError:
    return UserError(f"{task} has too few problems to hold some out; {remedy}")
