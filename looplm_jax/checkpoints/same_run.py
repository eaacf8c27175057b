"""Checks that a run that resumes in a run folder has the configuration of the run that wrote it."""

from collections.abc import Iterator
from typing import Any

from looplm_jax.codec import item_name
from looplm_jax.errors import UserError
from looplm_jax.resume import may_differ

_SHOWN = 5


def check_same_run(folder: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError if a run of another configuration would resume in this folder.

    `looplm_jax.resume` defines which fields may differ.

    Args:
      folder: the run folder, for the message.
      saved: the saved configuration: a recipe as `codec.to_dict` writes it, and further values that must agree, such as
        the fingerprint of the tokenizer.
      wanted: the same values of the run that resumes.

    Raises:
      UserError: some fields differ. The message has the first few, with both values.
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
    """Yields every plain value with its dotted path.

    An item of a list of dictionaries is named as in the codec: by its name, its topology, or its index.
    """
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {item_name(item, index): item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _fields(item, f"{path}.{key}" if path else key)
