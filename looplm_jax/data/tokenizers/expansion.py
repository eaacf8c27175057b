"""How much longer than its text a `tokenizer.json` can make what it encodes."""

import json
import re
from collections.abc import Iterator
from typing import Any

from looplm_jax.errors import UserError

_MOST = 1024  # times


def check_expansion(content: bytes) -> None:
    """Refuses a file whose replacements multiply the length of a text without measure; another program judges the rest.

    Raises:
      UserError: the replacements of one of its steps can make a text more than 1,024 times as long.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return
    for steps in (("normalizer", "pre_tokenizer"), ("decoder",)):
        factor = 1.0
        for step in steps:
            for pattern, replacement in _replacements(values.get(step)):
                factor *= max(_factor(pattern, replacement), 1.0)
        if factor > _MOST:
            raise UserError(
                f"the replacements in the {' and '.join(steps)} of the tokenizer.json can make a text more than "
                f"{_MOST:,} times as long; use another tokenizer"
            )


def _replacements(value: Any) -> Iterator[tuple[Any, str]]:
    """Yields pattern and replacement of every `Replace`, however they are nested."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [inner for inner in value.values() if isinstance(inner, dict | list)]
            if value.get("type") == "Replace" and isinstance(value.get("content"), str):
                yield value.get("pattern"), value["content"]


def _factor(pattern: Any, replacement: str) -> float:
    if isinstance(pattern, dict) and isinstance(found := pattern.get("String"), str):
        return len(replacement) / len(found) if found else len(replacement) + 1
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return len(replacement) + (not isinstance(regex, str) or _can_match_nothing(regex))


def _can_match_nothing(regex: str) -> bool:
    try:
        return "(?" in regex or re.fullmatch(regex, "") is not None
    except re.error:
        return True
