"""The processes of one run, and agreement between them over TCP.

Process 0 is the coordinator: it has a connection to each other process and relays their messages.

The device runtime has a coordination service too, but that has no public interface for processes, notices the loss of
any but process 0 only after a minute and a half without heartbeats, and then aborts the others with a stack trace. A
TCP connection breaks immediately.

If process 0 is killed, both notice at once, and race. The runtime writes a stack trace before it aborts, which takes a
tenth of a second or two, so a connection usually wins. On a machine that is so busy that the thread of the connection
does not run in that time, the process ends with SIGABRT instead. A thread of the runtime aborts without asking Python.
The callback that it could call instead (`missed_heartbeat_callback`) is not public, and with it the process aborts too
in jaxlib 0.10.2 (std::bad_cast). Whatever supervises the process starts it again, as after any other failure
(`tpu_setup/host/supervise.sh`).
"""

import collections
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from looplm_jax.codec import differences
from looplm_jax.distributed._connection import SILENCE_SECONDS, Connection
from looplm_jax.errors import UserError, at_most
from looplm_jax.terminal import print_error_unbuffered

LOST = 75
"""The exit status after the loss of another process: EX_TEMPFAIL of sysexits.h, "try again"."""

_SHUTDOWN = "shutdown"
_LAST_SECONDS = 5.0
_SHOWN = 3
_AGAIN = "start all processes again, and the run resumes from its latest valid checkpoint"

EndProcess = Callable[[str, int], NoReturn]
R = TypeVar("R")


@runtime_checkable
class ProcessGroup(Protocol):
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

    def shutdown(self) -> None:
        """Blocks until all processes have called this. Afterwards any of them may exit."""

    def abort_all(self, message: str, status: int) -> NoReturn:
        """Ends all processes immediately, each with one line on standard error."""


class SingleProcess:
    """The group of a run with a single process."""

    index, count = 0, 1

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns `[value]`."""
        del name
        return [value]

    def shutdown(self) -> None:
        """Does nothing."""

    def abort_all(self, message: str, status: int) -> NoReturn:
        """Ends this process."""
        end_process(message, status)


SINGLE_PROCESS = SingleProcess()
"""The group of a run with a single process, the default of `train`."""


def end_process(message: str, status: int) -> NoReturn:
    """Prints one line and exits, from any thread.

    Uses `os._exit`, which does not wait for threads that hang in a collective operation.
    """
    print_error_unbuffered(message)
    os._exit(status)


# Several processes


class Peer:
    """One of several processes. If another one is lost, this one exits with one line and the status `LOST`.

    Args:
      index: the index of this process.
      count: the number of processes.
      connections: on process 0, a connection to each other process; elsewhere, a connection to process 0.
      end: ends the process. Tests replace it.
    """

    def __init__(self, index: int, count: int, connections: Mapping[int, Connection], end: EndProcess = end_process):
        self.index, self.count = index, count
        self._connections, self._end_process = dict(connections), end
        self._changed = threading.Condition()

        # `_rounds` numbers the calls of this process. `_votes` is used by process 0 only.
        self._rounds: collections.Counter[str] = collections.Counter()
        self._votes: dict[tuple[str, int], dict[int, Any]] = collections.defaultdict(dict)
        self._results: dict[tuple[str, int], list[Any]] = {}
        self._is_shutting_down = False

        # Receiving in threads notices a lost process even while the main thread waits for a device.
        self._receivers = [
            threading.Thread(target=self._receive, args=(peer,), daemon=True, name=f"process {peer}")
            for peer in connections
        ]
        for receiver in self._receivers:
            receiver.start()

    # Gathering

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns the value of every process; see `ProcessGroup.gather`."""
        # Calls with the same name are numbered, and the n-th calls of all processes belong together.
        with self._changed:
            number = self._rounds[name]
            self._rounds[name] += 1

        if self.index == 0:
            self._count(0, name, number, value)
        else:
            self._connections[0].send(["vote", name, number, value])

        with self._changed:
            self._changed.wait_for(lambda: (name, number) in self._results)
            return self._results.pop((name, number))

    def shutdown(self) -> None:
        """Blocks until all processes have called this; see `ProcessGroup.shutdown`.

        Process 0 exits last, because the device runtime of the others would abort without it.
        """
        self.gather(_SHUTDOWN, None)
        if self.index == 0:
            self._wait_for(self._connections)
        for connection in self._connections.values():
            connection.close()

    def abort_all(self, message: str, status: int) -> NoReturn:
        """Ends all processes; see `ProcessGroup.abort_all`."""
        self._end(self.index, message, status)

    def _receive(self, peer: int) -> None:
        """Dispatches the messages of one connection until it is closed."""
        for kind, *content in self._connections[peer].received():
            if kind == "vote":
                self._count(peer, *content)
            elif kind == "result":
                self._keep(*content)
            else:
                self._end(*content)
        # A connection that closes before all processes have agreed to shut down means that a process was lost.
        if not self._is_shutting_down:
            self._end_without(peer)

    # Ending

    def _end_without(self, peer: int) -> NoReturn:
        """Ends all processes because `peer` is lost.

        The message goes to `peer` too: a process that was only stopped reads, once it continues, that it was considered
        lost.
        """
        connection = self._connections[peer]
        how = (
            f"silent for {SILENCE_SECONDS:.0f} seconds, stopped or its machine gone"
            if connection.is_silent
            else "killed"
        )

        message = f"lost{f' on {connection.host}' if connection.host else ''}, {how}; {_AGAIN}"
        connection.send(["abort", peer, message, LOST])
        self._end(peer, message, LOST)

    def _count(self, peer: int, name: str, number: int, value: Any) -> None:
        """Collects one value on process 0 and broadcasts the result once all values have arrived."""
        with self._changed:
            votes = self._votes[name, number]
            votes[peer] = value
            if len(votes) < self.count:
                return
            del self._votes[name, number]

        values = [votes[index] for index in range(self.count)]
        self._is_shutting_down |= name == _SHUTDOWN

        # Sent outside the lock, because sending may block.
        for connection in self._connections.values():
            connection.send(["result", name, number, values])
        self._keep(name, number, values)

    def _keep(self, name: str, number: int, values: list[Any]) -> None:
        """Stores a result and wakes the threads that wait for it."""
        with self._changed:
            self._is_shutting_down |= name == _SHUTDOWN
            self._results[name, number] = values
            self._changed.notify_all()

    def _end(self, origin: int, message: str, status: int) -> NoReturn:
        """Ends this process, because process `origin` ends or is lost.

        Process 0 first notifies the others and waits until they have exited.
        """
        # From here on, a closed connection does not mean that a process was lost.
        self._is_shutting_down = True
        others = {peer: connection for peer, connection in self._connections.items() if peer != origin}

        # Only the origin and process 0, which relays, send the message; the others have received it.
        if self.index in (0, origin):
            for connection in others.values():
                connection.send(["abort", origin, message, status])
        if self.index == 0:
            self._wait_for(others)

        text = message if origin == self.index else f"process {origin}: {message}"
        self._end_process(f"process {self.index}: {text}", status)

    @staticmethod
    def _wait_for(connections: Mapping[int, Connection]) -> None:
        """Waits a few seconds for each connection to be closed by the other end."""
        for connection in connections.values():
            connection.wait_closed(_LAST_SECONDS)


# Consistency


def check_same(group: ProcessGroup, what: str, value: Any) -> None:
    """Raises UserError on all processes if the `value` of one of them differs from that of process 0.

    Args:
      group: the processes. All of them must call this together.
      what: a name of the value for the message, such as "configuration".
      value: JSON. Nested dictionaries are compared field by field.

    Raises:
      UserError: names the process and the first few fields that differ.
    """
    # Every process has all values, so all of them raise the same error without another message.
    first, *others = group.gather(f"same {what}", value)

    for index, other in enumerate(others, start=1):
        differing = [f"{field.path}: {field.ours}, there {field.theirs}" for field in differences(first, other)]
        if differing:
            raise UserError(
                f"process {index} was started with another {what} than process 0 ({at_most(differing, _SHOWN, '; ')}); "
                "start all processes with the same command, data and version"
            )


def first_on_process_0(group: ProcessGroup, name: str, work: Callable[[], R]) -> R:
    """Returns `work()`, which runs on process 0 first and then on the others.

    The others find the files that process 0 has written to the shared file system.
    """
    result = work() if group.index == 0 else None
    group.gather(name, None)
    return work() if result is None else result
