"""Random draws of the tasks: each problem from a generator of its own, on the asked side of the split."""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

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
    raise UserError(f"{task} has too few problems to hold some out; {remedy}")
