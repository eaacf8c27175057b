"""Checks that all processes were started alike, and runs work on process 0 before the others."""

from collections.abc import Callable
from typing import Any, TypeVar

from looplm_jax.distributed.cluster import Cluster
from looplm_jax.errors import UserError

R = TypeVar("R")

_SHOWN = 3


def check_same(cluster: Cluster, what: str, value: Any) -> None:
    """Raises UserError on all processes if the `value` of one of them differs from that of process 0.

    Args:
      cluster: the processes. All of them must call this together.
      what: a name of the value for the message, such as "configuration".
      value: JSON. Nested dictionaries are compared field by field.

    Raises:
      UserError: names the process and the first few fields that differ.
    """
    first, *others = (dict(_fields(given)) for given in cluster.gather(f"same {what}", value))

    for index, other in enumerate(others, start=1):
        differing = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if differing:
            shown = [f"{name}: {first.get(name)}, there {other.get(name)}" for name in differing[:_SHOWN]]
            more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise UserError(
                f"process {index} was started with another {what} than process 0 ({'; '.join(shown)}{more}); "
                "start all processes with the same command, data and version"
            )


def first_on_process_0(cluster: Cluster, name: str, work: Callable[[], R]) -> R:
    """Returns `work()`, which runs on process 0 first and then on the others.

    The others find the files that process 0 has written to the shared file system.
    """
    result = work() if cluster.index == 0 else None
    cluster.gather(name, None)
    return work() if result is None else result


def _fields(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Returns the dotted path and value of every plain value."""
    if isinstance(value, list):
        value = {str(item.get("name", n) if isinstance(item, dict) else n): item for n, item in enumerate(value)}
    if not isinstance(value, dict):
        return [(path, value)]
    return [field for key, item in value.items() for field in _fields(item, f"{path}.{key}" if path else key)]
