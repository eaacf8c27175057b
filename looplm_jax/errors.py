"""The exception for mistakes that the user can fix, and phrases for its messages."""

import difflib
from collections.abc import Iterable, Sequence

_LONGEST = 200  # characters of another library's message


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
    # Sorted, so that the message does not depend on the order of a set.
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise


def at_most(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """Returns the first `most` items as text, such as `a, b, c and 2 more`.

    Args:
      items: the items.
      most: the largest number of items to show.
      separator: the text between two items. After a semicolon, the number of the others follows one too.
    """
    shown, more = separator.join(items[:most]), len(items) - most
    return f"{shown}{separator.strip(', ')} and {more} more" if more > 0 else shown


def brief(error: Exception) -> str:
    """Returns the type and message of another library's error as one line of bounded length."""
    # Messages of other libraries may have many lines.
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"
