"""What can be wrong with a step: it is damaged, of another version, cannot be read for now, or could not be saved."""

from looplm_jax.errors import UserError

_LONGEST = 200


class DamagedError(Exception):
    """A step, or a part of it, is missing or altered: its files say so. The message says which part.

    Callers of this package see a `UserError` in its place.
    """


class OtherVersionError(Exception):
    """A step is whole, and another version of this package wrote it. The message says which format it has.

    Callers of this package see a `UserError` in its place.
    """


class UnreadableError(Exception):
    """A part of a step cannot be read, which says nothing about what was saved.

    Callers of this package see a `UserError` in its place.
    """


class RefusedError(UnreadableError):
    """The disk or the bucket refused to give a part of a step. The next attempt may succeed."""


class SaveError(UserError):
    """The disk refused a step. What was saved before stays, and training could go on."""


def brief(error: Exception) -> str:
    """An error of another library in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"
