"""Strict JSON: numbers that are not finite are written as null, because JSON has no NaN or infinity."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

_LARGEST_STEP = 2**63


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


def number(value: Any) -> float:
    """Returns a value of a row as a float, or NaN if it is null or not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def numbers(value: Any) -> list[float]:
    """Returns a list of a row as floats, with NaN for entries that are not numbers. A single number becomes a list."""
    return [number(entry) for entry in value] if isinstance(value, list) else [number(value)]


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
