"""The one exception for mistakes that the user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What is wrong and how to mend it, in one line. Commands print it and exit with status 2."""


def suggest(word: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """`"; did you mean 'x'?"` when a known word is close to `word`, else `otherwise`, or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise
