"""What can be wrong with a step: it cannot be trusted, or it could not be saved."""

from looplm_jax.errors import UserError

_LONGEST = 200


class DamagedError(Exception):
    """A step, or a part of it, is missing, unreadable or altered. The message says which part.

    Callers of this package see a `UserError` in its place.
    """


class SaveError(UserError):
    """The disk refused a step. What was saved before stays, and training could go on."""


def brief(error: Exception) -> str:
    """An error of another library in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"
