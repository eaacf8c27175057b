"""The rendezvous of the processes of a run: all connect to process 0, which waits until all have arrived."""

import contextlib
import hmac
import socket
import threading
import time
from collections.abc import Iterable

from looplm_jax.distributed.link import Link
from looplm_jax.errors import UserError
from looplm_jax.printing import complain_at_once

PATIENCE_SECONDS = 300.0
_GREETING_SECONDS = 10.0
_NEWS_SECONDS = 30.0
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_MOST_STRANGERS = 256  # the maximum number of unidentified connections


# Process 0


class Meeting:
    """The rendezvous on process 0. Each connection is greeted in its own thread, so a silent one delays no other.

    Args:
      token: the first message of a process of this run. Connections that send another are closed.
      count: the number of processes, including process 0.
    """

    def __init__(self, token: bytes, count: int):
        self._token, self._count = token, count
        self._arriving = threading.Lock()
        self._links: dict[int, Link] = {}
        self._complete = False
        self._strangers: set[str] = set()
        self._greetings = threading.BoundedSemaphore(count + _MOST_STRANGERS)

    def accept(self, listener: socket.socket, *, patience: float = PATIENCE_SECONDS) -> dict[int, Link]:
        """Returns a link to each other process. They may arrive at any time and in any order.

        Raises:
          UserError: some are still missing after `patience` seconds. The others receive the same message.
        """
        listener.settimeout(_POLL_SECONDS)
        news = _News(patience)

        while missing := self._missing():
            # The listener has a short timeout, so that disconnected processes and the time limit are noticed.
            with contextlib.suppress(
                TimeoutError, ConnectionError
            ):  # ConnectionError: an unrelated client has disconnected already
                self._greet_in_a_thread(listener.accept()[0])

            if news.over:
                message = f"{_named(missing)} of {self._count} did not arrive within {patience:.0f} seconds"
                message += "; start each on its host, with the same --coordinator and --processes"
                self._dismiss(message)
                raise UserError(message)

            if news.due:
                complain_at_once(f"process 0: waiting for {_named(missing)} of {self._count}")

        for link in self._links.values():
            link.send(["go"])
        return self._links

    def _missing(self) -> list[int]:
        """Returns the indices of the processes that are not connected; empty once the rendezvous is complete."""
        with self._arriving:
            broken = [] if self._complete else [index for index, link in self._links.items() if link.broken]
            for index in broken:
                self._links.pop(index).close()
            return [index for index in range(1, self._count) if index not in self._links]

    def _greet_in_a_thread(self, connection: socket.socket) -> None:
        """Greets a connection in a thread, or closes it if too many are unidentified."""
        if not self._greetings.acquire(blocking=False):
            connection.close()
            return
        threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Identifies a connection by its first message."""
        link = Link(connection)
        try:
            match link.receive(_GREETING_SECONDS):
                # A boolean is an int in Python, but not a process index.
                case [str(token), int(index), *details] if self._knows(token) and not isinstance(index, bool):
                    self._arrive(link, index, details)
                case _:
                    self._drop(link)
        finally:
            self._greetings.release()

    def _knows(self, token: str) -> bool:
        """Whether `token` is that of this run. The comparison takes constant time."""
        return hmac.compare_digest(token.encode(errors="replace"), self._token.hex().encode())

    def _arrive(self, link: Link, index: int, details: list[object]) -> None:
        """Accepts a process, or refuses it if its flags contradict those of process 0."""
        count = details[0] if details else self._count
        if count != self._count:
            _refuse(link, f"process {index} was started with --processes {count}, process 0 with {self._count}")
        elif not 0 < index < self._count:
            _refuse(link, f"two processes were started as --process {index}")
        else:
            self._keep(link, index)

    def _keep(self, link: Link, index: int) -> None:
        """Keeps the link of a process that arrived.

        If an index arrives twice, its process was restarted or two processes have the same index. The later one is
        kept, except that a complete rendezvous accepts no further process.
        """
        with self._arriving:
            before = link if self._complete else self._links.get(index)
            if not self._complete:
                self._links[index] = link
                self._complete = len(self._links) == self._count - 1

        # Refused outside the lock, because sending may block.
        if before is not None:
            where = " and ".join(sorted({before.host, link.host}))
            _refuse(before, f"two processes were started as --process {index} (on {where})")

    def _drop(self, link: Link) -> None:
        """Closes a connection of an unrelated program, with one warning per host."""
        host = link.host
        link.close()
        if host and host not in self._strangers:
            self._strangers.add(host)
            complain_at_once(f"process 0: closed a connection from {host}, which is no process of this run")

    def _dismiss(self, message: str) -> None:
        """Sends a refusal to all connected processes."""
        with self._arriving:
            for link in self._links.values():
                link.send(["refused", message])
                link.close()


# Other processes


def reach(
    address: tuple[str, int], token: bytes, index: int, count: int, *, patience: float = PATIENCE_SECONDS
) -> Link:
    """Returns a link to process 0, once process 0 reports that all processes have arrived.

    Raises:
      UserError: process 0 does not answer for `patience` seconds, or refuses this process.
    """
    where = f"process 0 at {address[0]}:{address[1]}"
    news = _News(patience)

    while True:
        reason = "it closed the connection"
        try:
            link = Link(socket.create_connection(address, timeout=_CONNECT_SECONDS))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            link.send([token.hex(), index, count])
            match link.receive(patience + _CONNECT_SECONDS):
                case ["go"]:
                    return link
                case ["refused", str(message)]:
                    link.close()
                    raise UserError(message)
            link.close()

        if news.over:
            raise UserError(
                f"{where} did not answer within {patience:.0f} seconds ({reason}); start it there, and let the port "
                "through the firewall"
            )

        if news.due:
            complain_at_once(f"process {index}: waiting for {where} ({reason})")

        time.sleep(_RETRY_SECONDS)


class _News:
    """Tracks when to report that a process is still missing, and when to give up."""

    def __init__(self, patience: float):
        self._start = self._last = time.monotonic()
        self._patience = patience

    @property
    def over(self) -> bool:
        """Whether the time limit is exceeded."""
        return time.monotonic() - self._start > self._patience

    @property
    def due(self) -> bool:
        """Whether a report is due. If so, reading this property restarts the interval."""
        due = time.monotonic() - self._last > _NEWS_SECONDS
        if due:
            self._last = time.monotonic()
        return due


# Messages


def _refuse(link: Link, message: str) -> None:
    """Refuses a process, with one line on both ends."""
    message += "; start all processes with the same command, each with a --process of its own"
    complain_at_once(f"process 0: {message}")
    link.send(["refused", message])
    link.close()


def _named(indices: Iterable[int]) -> str:
    """Returns the processes as text, at most 8 of them."""
    indices = list(indices)
    if len(indices) == 1:
        return f"process {indices[0]}"
    shown = ", ".join(map(str, indices[:8]))
    return f"processes {shown}{f' and {len(indices) - 8} more' if len(indices) > 8 else ''}"
