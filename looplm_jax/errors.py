"""The exception for mistakes that the user can fix."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """An error that the user can fix. Its message is one line: what is wrong and how to fix it.

    Commands print it without a traceback and exit with `status`.
    """

    status = 2


def suggest(word: str, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.6) -> str:
    """Returns `"; did you mean 'x'?"` if a known word is close to `word`.

    Args:
      word: the unknown word.
      known: the known words.
      otherwise: the result if no word is close; by default a list of the known words.
      cutoff: the minimum similarity as `difflib` measures it, between 0 and 1.
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise
