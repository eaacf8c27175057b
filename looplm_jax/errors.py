"""The one exception for mistakes that the user can mend."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What is wrong and how to fix it, in one line. Commands print it and exit with `status`."""

    status = 2


def suggest(word: str, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """Returns `"; did you mean 'x'?"` when a known word is close to `word`, else `otherwise`, or the known words.

    `cutoff` is how close, as difflib measures it: 1 is the word itself.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise
