"""Whether a run folder belongs to the run that wants to continue in it."""

from collections.abc import Iterator
from typing import Any

from looplm_jax.errors import UserError
from looplm_jax.resume import may_differ

_SHOWN = 5


def check_same_run(folder: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses a run of another configuration; `looplm_jax.resume` says what may differ.

    Args:
      folder: the run folder, for the message.
      saved: what it was trained with: a recipe as `codec.to_dict` writes it, and what else must agree, such as the
        fingerprint of the tokeniser.
      wanted: the same of the run that wants to continue.

    Raises:
      UserError: the fields that differ, with both values.
    """
    before, now = dict(_fields(saved)), dict(_fields(wanted))
    differing = [
        f"{path}: {before.get(path, 'absent')}, now {now.get(path, 'absent')}"
        for path in {**before, **now}
        if before.get(path) != now.get(path) and not may_differ(path)
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(
            f"run folder {folder} was trained with another configuration ({'; '.join(differing[:_SHOWN])}{more}); "
            "use another --out or the saved recipe"
        )


def _fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value with its dotted path; an item of a list goes by its name, or else by its index."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {str(item.get("name", index)): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _fields(item, f"{path}.{key}" if path else key)
