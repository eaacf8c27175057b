"""Errors of a step: it is damaged, of another version, currently unreadable, or could not be saved."""

from looplm_jax.errors import UserError

_LONGEST = 200


class DamagedError(Exception):
    """A step or a part of it is missing or altered, as its files show. The message names the part.

    The public functions of this package convert it to a `UserError`.
    """


class OtherVersionError(Exception):
    """A step is complete but was written by another version of this package. The message names its format.

    The public functions of this package convert it to a `UserError`.
    """


class UnreadableError(Exception):
    """A part of a step cannot be read, which does not imply that it is damaged.

    The public functions of this package convert it to a `UserError`.
    """


class RefusedError(UnreadableError):
    """The file system or the bucket refused to read a part of a step. A retry may succeed."""


class SaveError(UserError):
    """The file system or the bucket refused to write a step. Earlier steps are intact, and training can continue."""


def brief(error: Exception) -> str:
    """Returns the type and message of another library's error as one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"
