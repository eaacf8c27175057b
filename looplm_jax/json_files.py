"""Reads JSON objects from untrusted files."""

import json
from pathlib import Path
from typing import Any

from looplm_jax.errors import UserError

_LARGEST_FILE = 10 * 2**20  # the index of a model with 600 billion parameters has 9 MB
_MOST_LEVELS = 16


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      UserError: the file is missing, unreadable, larger than 10 MiB, nested more than 16 levels deep, or not a JSON
        object.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is missing; copy it from where the model comes from")
        if path.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{path} is larger than {_LARGEST_FILE >> 20} MiB; it is no {path.name}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    except RecursionError:
        raise _too_deep(path) from None
    except UserError:
        raise
    except ValueError as error:  # not JSON, not Unicode, or a number of too many digits
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())[:100]}); copy it again") from None

    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(values).__name__}; copy it again")
    if _is_deeper(values, _MOST_LEVELS):
        raise _too_deep(path)
    return values


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested more than `levels` levels deep."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in items)


def _too_deep(path: Path) -> UserError:
    """Returns the error for a file that is nested too deep."""
    return UserError(f"{path} is nested more than {_MOST_LEVELS} levels deep; it is no {path.name}")
