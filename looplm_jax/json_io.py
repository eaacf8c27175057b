"""Reads JSON of others with limits, and writes strict JSON of our own.

JSON has no NaN and no infinity: numbers that are not finite are written as null.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from looplm_jax.errors import UserError

_LARGEST_FILE = 10 * 2**20  # the index of a model with 600 billion parameters has 9 MB
_MOST_LEVELS = 16
_LARGEST_STEP = 2**63


# Untrusted files


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is missing, unreadable, larger than 10 MiB, nested more than 16 levels deep, or not a JSON
        object.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing; copy it from where the model comes from")
        # Checked before reading, because the file may be from anywhere.
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB; it is not a {path.name}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except RecursionError:
        raise _too_deep(path) from None
    except UserError:
        raise
    except ValueError as error:  # not JSON, not Unicode, or a number of too many digits
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())[:100]}); copy it again") from None

    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(values).__name__}; copy it again")
    if _is_deeper(values, _MOST_LEVELS):
        raise _too_deep(path)
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested more than `levels` levels deep."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def _too_deep(path: Path) -> UserError:
    """Returns the error for a file that is nested too deep."""
    return UserError(f"{path} is nested more than {_MOST_LEVELS} levels deep; it is not a {path.name}")


# Strict JSON


def dumps(
    value: Any, *, indent: int | None = None, sort_keys: bool = False, default: Callable[[Any], Any] | None = None
) -> str:
    """Returns `value` as JSON, with null for every NaN and infinity in it."""
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, default=default, allow_nan=False)


def metrics_row(line: bytes) -> dict[str, Any] | None:
    """Returns the object of a line of `metrics.jsonl`, or None if the line is damaged.

    A valid line is a JSON object with a string `kind` and an integer `step`. Bare NaN, which older versions wrote, is
    accepted.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):  # includes invalid UTF-8, and numbers with thousands of digits
        return None

    if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
        return None

    step = row.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < _LARGEST_STEP
    return row if is_step else None


def as_float(value: Any) -> float:
    """Returns a value of a row as a float, or NaN if it is null or not a number."""
    # A bool is an int in Python.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON may have integers beyond all floats
        return math.nan


def numbers(value: Any) -> list[float]:
    """Returns a list of a row as floats, with NaN for entries that are not numbers. A single number becomes a list."""
    return [as_float(entry) for entry in value] if isinstance(value, list) else [as_float(value)]


def with_nan(value: Any) -> Any:
    """Returns a value that was read from JSON with NaN for every null: the inverse of `dumps` for results."""
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: with_nan(entry) for key, entry in value.items()}
    return [with_nan(entry) for entry in value] if isinstance(value, list) else value


def _finite(value: Any) -> Any:
    """Returns a value with None for every NaN and infinity in it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _key(key: Any) -> Any:
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key
