"""Tasks by name and options, as in `mano` or `mano:length=10,modulus=23`."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from looplm_jax.codec import from_dict
from looplm_jax.data.sources import _huggingface as huggingface
from looplm_jax.data.tasks._addition import Addition
from looplm_jax.data.tasks._base import Task
from looplm_jax.data.tasks._capo import Capo
from looplm_jax.data.tasks._mano import Mano
from looplm_jax.data.tasks._p_hop import PHop
from looplm_jax.data.tasks._reachability import Reachability
from looplm_jax.data.tasks._three_hop import ThreeHop
from looplm_jax.errors import UserError, suggest

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        "addition": Addition,
        "capo": Capo,
        "mano": Mano,
        "phop": PHop,
        "reachability": Reachability,
        "threehop": ThreeHop,
    }
)

# `name:options`. Two slashes after the colon would make it a URL.
_SPEC = re.compile(r"(?P<name>[A-Za-z]\w+):(?!/)(?P<options>.*)")


def is_task(path: str) -> bool:
    """Whether the path of a source names a task rather than files or a dataset."""
    return path in TASKS or (_SPEC.fullmatch(path) is not None and not path.startswith(huggingface.PREFIX))


def make_task(spec: str) -> Task:
    """Returns the task that a path specifies.

    Raises:
      UserError: an unknown task or option (with a suggestion), or a value that the task rejects.
    """
    match = _SPEC.fullmatch(spec)
    name, options = (match["name"], match["options"]) if match else (spec, "")
    if name not in TASKS:
        raise UserError(f"no such task {name!r}{suggest(name, TASKS)}")

    pairs = [option.partition("=") for option in options.split(",") if option]
    if bare := [key for key, equals, _ in pairs if not equals]:
        raise UserError(f"{spec}: {bare[0]!r} has no value; write {name}:option=value,option=value")

    # `from_dict` converts the strings to the types of the task's fields.
    return from_dict(TASKS[name], {key.strip(): value.strip() for key, _, value in pairs}, name)
