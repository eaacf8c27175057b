"""Checks of the type and range of user input, with errors of one line.

NumPy and JAX scalars count as numbers; booleans do not.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from looplm_jax.errors import UserError

MOST = 2**31 - 1  # the largest int32


def whole_number(name: str, value: Any, *, least: int = 0, most: int = MOST) -> int:
    """Returns `value` as an int. Raises UserError unless it is a whole number in `least..most`."""
    # bool is a subclass of int.
    if isinstance(value, bool | np.bool_):
        raise UserError(f"{name} must be a whole number, not {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be a whole number, not {_shown(value)}") from None

    if number < least:
        raise UserError(f"{name} must be at least {least}, not {number}")
    if number > most:
        raise UserError(f"{name} must be at most {most}, not {number}")
    return number


def real_number(name: str, value: Any) -> float:
    """Returns `value` as a float, which may be infinite or NaN. Raises UserError unless it is a number."""
    if isinstance(value, bool | np.bool_ | str | bytes) or not hasattr(value, "__float__"):
        raise UserError(f"{name} must be a number, not {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a number, not {_shown(value)}") from None


def truth(name: str, value: Any) -> bool:
    """Returns `value` as a bool. Raises UserError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"{name} must be True or False, not {_shown(value)}")
    return bool(value)


def token_ids(name: str, values: Any) -> tuple[int, ...]:
    """Returns `values` as a tuple of ints. Raises UserError unless they are an ordered collection of whole numbers."""
    if isinstance(values, str | bytes | bytearray):
        raise UserError(f"{name} must be token ids, not text; encode it with the tokenizer")

    # Converts a NumPy or JAX array in one transfer.
    ordered = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(ordered, set | frozenset | dict) or not isinstance(ordered, Iterable):
        raise UserError(f"{name} must be a list or tuple of token ids, not {_shown(values)}")

    ids = tuple(ordered)
    # Prompts are long: ids that are plain ints pass without a check of each range.
    for token in ids:
        if type(token) is not int:
            return tuple(whole_number(f"each of {name}", token, least=-MOST - 1) for token in ids)
    return ids


def _shown(value: Any) -> str:
    """Returns a short form of a value for a one-line message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
