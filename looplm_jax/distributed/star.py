"""Agreement between processes over TCP, in a star: process 0 has a link to each other process and relays messages.

The device runtime has a coordination service too, but that has no public interface for processes, is slow to detect a
process that was killed, and then aborts the others with a stack trace. A TCP connection breaks immediately.
"""

import collections
import threading
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from looplm_jax.distributed.cluster import LOST, end_process
from looplm_jax.distributed.link import SILENCE_SECONDS, Link

_LEAVE = "leave"
_LAST_SECONDS = 5.0
_AGAIN = "start all processes again, and the run resumes from its latest valid checkpoint"

End = Callable[[str, int], NoReturn]


class Member:
    """One of several processes. If another one is lost, this one exits with one line and the status `LOST`.

    Args:
      index: the index of this process.
      count: the number of processes.
      links: on process 0, a link to each other process; elsewhere, a link to process 0.
      end: ends the process. Tests replace it.
    """

    def __init__(self, index: int, count: int, links: Mapping[int, Link], end: End = end_process):
        self.index, self.count = index, count
        self._links, self._end_process = dict(links), end
        self._changed = threading.Condition()

        self._rounds: collections.Counter[str] = collections.Counter()
        self._votes: dict[tuple[str, int], dict[int, Any]] = collections.defaultdict(dict)
        self._results: dict[tuple[str, int], list[Any]] = {}
        self._leaving = False

        self._receivers = [
            threading.Thread(target=self._receive, args=(peer,), daemon=True, name=f"process {peer}") for peer in links
        ]
        for receiver in self._receivers:
            receiver.start()

    # Gathering

    def gather(self, name: str, value: Any) -> list[Any]:
        """Returns the value of every process; see `Cluster.gather`."""
        # Calls with the same name are numbered, and the n-th calls of all processes belong together.
        with self._changed:
            number = self._rounds[name]
            self._rounds[name] += 1

        if self.index == 0:
            self._count(0, name, number, value)
        else:
            self._links[0].send(["vote", name, number, value])

        with self._changed:
            self._changed.wait_for(lambda: (name, number) in self._results)
            return self._results.pop((name, number))

    def leave(self) -> None:
        """Blocks until all processes have called this; see `Cluster.leave`.

        Process 0 exits last, because the device runtime of the others would abort without it.
        """
        self.gather(_LEAVE, None)
        if self.index == 0:
            self._wait_for(self._links)
        for link in self._links.values():
            link.close()

    def end(self, message: str, status: int) -> NoReturn:
        """Ends all processes; see `Cluster.end`."""
        self._end(self.index, message, status)

    def _receive(self, peer: int) -> None:
        """Dispatches the messages of one link until it is closed."""
        for kind, *content in self._links[peer].received():
            if kind == "vote":
                self._count(peer, *content)
            elif kind == "result":
                self._keep(*content)
            else:
                self._end(*content)
        # A link that closes before all processes have agreed to leave means that a process was lost.
        if not self._leaving:
            self._end_without(peer)

    # Ending

    def _end_without(self, peer: int) -> NoReturn:
        """Ends all processes because `peer` is lost.

        The message goes to `peer` too: a process that was only stopped reads, once it continues, that it was considered
        lost.
        """
        link = self._links[peer]
        how = f"silent for {SILENCE_SECONDS:.0f} seconds, stopped or its machine gone" if link.silent else "killed"
        message = f"lost{f' on {link.host}' if link.host else ''}, {how}; {_AGAIN}"
        link.send(["end", peer, message, LOST])
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
        self._leaving |= name == _LEAVE

        # Sent outside the lock, because sending may block.
        for link in self._links.values():
            link.send(["result", name, number, values])
        self._keep(name, number, values)

    def _keep(self, name: str, number: int, values: list[Any]) -> None:
        """Stores a result and wakes the threads that wait for it."""
        with self._changed:
            self._leaving |= name == _LEAVE
            self._results[name, number] = values
            self._changed.notify_all()

    def _end(self, origin: int, message: str, status: int) -> NoReturn:
        """Ends this process, because process `origin` ends or is lost.

        Process 0 first notifies the others and waits until they have exited.
        """
        # From here on, a closed link does not mean that a process was lost.
        self._leaving = True
        others = {peer: link for peer, link in self._links.items() if peer != origin}

        if self.index in (0, origin):
            for link in others.values():
                link.send(["end", origin, message, status])
        if self.index == 0:
            self._wait_for(others)

        said = message if origin == self.index else f"process {origin}: {message}"
        self._end_process(f"process {self.index}: {said}", status)

    @staticmethod
    def _wait_for(links: Mapping[int, Link]) -> None:
        """Waits a few seconds for each link to be closed by the other end."""
        for link in links.values():
            link.wait_closed(_LAST_SECONDS)
