"""The error of a step that cannot be trusted; callers of this package see a `UserError` in its place."""

_LONGEST = 200


class DamagedError(Exception):
    """A step, or a part of it, is missing, unreadable or altered. The message says which part."""


def brief(error: Exception) -> str:
    """An error of another library in one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}"
