"""The interface through which a process of a run communicates with the other processes."""

import os
from typing import Any, NoReturn, Protocol, runtime_checkable

from looplm_jax.printing import complain_at_once

LOST = 75  # exit status after the loss of another process: EX_TEMPFAIL of sysexits.h, "try again"


@runtime_checkable
class Cluster(Protocol):
    """The processes of a run, seen from one of them. No method uses a device or waits for one."""

    @property
    def index(self) -> int:
        """The index of this process, counted from 0."""

    @property
    def count(self) -> int:
        """The number of processes."""

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns the JSON `value` of every process, ordered by index. The list is the same on all processes.

        The n-th call with a name is matched with the n-th call with that name on the other processes, and blocks until
        all of them have made it.
        """

    def leave(self) -> None:
        """Blocks until all processes have called this. Afterwards any of them may exit."""

    def end(self, message: str, status: int) -> NoReturn:
        """Ends all processes immediately, each with one line on standard error."""


class Alone:
    """The cluster of a run with a single process."""

    index, count = 0, 1

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns `[value]`."""
        del name
        return [value]

    def leave(self) -> None:
        """Does nothing."""

    def end(self, message: str, status: int) -> NoReturn:
        """Ends this process."""
        end_process(message, status)


ALONE = Alone()


def end_process(message: str, status: int) -> NoReturn:
    """Prints one line and exits, from any thread.

    Uses `os._exit`, which does not wait for threads that hang in a collective operation.
    """
    complain_at_once(message)
    os._exit(status)
