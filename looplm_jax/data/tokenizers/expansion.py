"""A limit on how much longer than its text a `tokenizer.json` can make the output."""

import json
import re
from collections.abc import Iterator
from typing import Any

from looplm_jax.errors import UserError

_MOST = 1024  # the longest allowed output, as a multiple of the input length


def check_expansion(content: bytes) -> None:
    """Rejects a `tokenizer.json` whose replacement rules can multiply the length of a text without a reasonable bound.

    Content that is not a JSON object is accepted here; the `tokenizers` library reports it.

    Raises:
      UserError: the replacements of encoding, or those of decoding, can make a text more than 1,024 times as long.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return

    # The factors of replacements that run one after another multiply. Encoding and decoding are separate chains.
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
    """Yields the pattern and the replacement of every `Replace` step, at any depth of nesting."""
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
    """Returns an upper bound on the growth of a text by one replacement rule."""
    if isinstance(pattern, dict) and isinstance(found := pattern.get("String"), str):
        # An empty pattern matches between all characters: each character gains one replacement.
        return len(replacement) / len(found) if found else len(replacement) + 1

    # A regular expression matches at least one character per replacement, unless it can match the empty string.
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return len(replacement) + (not isinstance(regex, str) or _can_match_nothing(regex))


def _can_match_nothing(regex: str) -> bool:
    """Whether a regular expression may match the empty string. True if Python cannot decide it."""
    try:
        return "(?" in regex or re.fullmatch(regex, "") is not None
    except re.error:
        return True
