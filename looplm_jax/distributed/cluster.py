"""What a process of a run can ask of the others."""

import os
from typing import Any, NoReturn, Protocol, runtime_checkable

from looplm_jax.printing import complain_at_once

LOST = 75  # exit status where another process was lost: EX_TEMPFAIL of sysexits.h, "try again"


@runtime_checkable
class Cluster(Protocol):
    """The processes of a run, seen from one of them. Nothing here touches a device, or waits for one."""

    @property
    def index(self) -> int:
        """Which process this is, counted from 0."""

    @property
    def count(self) -> int:
        """How many there are."""

    def gather(self, name: str, value: Any) -> list[Any]:
        """The JSON `value` of every process, in order of their indices, the same list on all of them.

        The n-th call with a name meets the n-th call with that name on the other processes, and waits for it.
        """

    def leave(self) -> None:
        """Wait until all processes want to leave, after which none misses another."""

    def end(self, message: str, status: int) -> NoReturn:
        """End all processes at once, each with one line on standard error."""


class Alone:
    """A single process."""

    index, count = 0, 1

    def gather(self, name: str, value: Any) -> list[Any]:
        """The value."""
        del name
        return [value]

    def leave(self) -> None:
        """Nobody else is here."""

    def end(self, message: str, status: int) -> NoReturn:
        """End this process."""
        end_process(message, status)


ALONE = Alone()


def end_process(message: str, status: int) -> NoReturn:
    """Say one line and end, from any thread, without waiting for one that hangs in a collective operation."""
    complain_at_once(message)
    os._exit(status)
