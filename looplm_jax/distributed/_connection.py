"""Connections between the processes of a run: TCP with heartbeats, and the rendezvous that opens them.

A connection carries newline-delimited JSON. All processes connect to process 0, which waits until all have arrived.
"""

import contextlib
import hmac
import json
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from looplm_jax.errors import UserError, at_most
from looplm_jax.terminal import print_error_unbuffered

_HEARTBEAT_SECONDS = 5.0
_MAX_IDENTIFICATION = 1000  # bytes of the first message
_MAX_MESSAGE = 2**26  # bytes; far more than any value that processes exchange
SILENCE_SECONDS = 60.0  # without a heartbeat for this long, the other process is considered lost

# Of the rendezvous.
TIMEOUT_SECONDS = 300.0
_IDENTIFY_SECONDS = 10.0
_REPORT_SECONDS = 30.0
_POLL_SECONDS = 0.1
_RETRY_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_MAX_UNIDENTIFIED = 256  # the maximum number of unidentified connections


class Connection:
    """One end of a TCP connection. Any thread may send; only one thread may receive.

    Args:
      sock: a connected socket.
      silence: the seconds without a heartbeat after which the other end is considered lost.
    """

    def __init__(self, sock: socket.socket, *, silence: float = SILENCE_SECONDS):
        sock.settimeout(silence)
        with contextlib.suppress(OSError):  # low latency for small messages; socket pairs have no TCP options
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        self._socket, self._silence = sock, silence
        self._lines = sock.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.is_silent = False  # True if the other end stopped sending without closing the connection

    def send(self, message: Any) -> None:
        """Sends a JSON value. Does nothing if the connection is lost; the receiving thread detects that."""
        # The lock keeps the messages of several threads apart.
        with contextlib.suppress(OSError), self._sending:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Any:
        """Returns the first message, or None if no valid message arrives in time.

        The other end may be an unrelated program, so the number of bytes and the total time are bounded, however slowly
        the bytes arrive.
        """
        # Invalid JSON and JSON that is nested too deep are not from a process of this run.
        try:
            return json.loads(self._first_line(time.monotonic() + seconds))
        except (OSError, ValueError, RecursionError):
            return None

    def received(self) -> Iterator[Any]:
        """Yields messages, without heartbeats, until the connection is closed or silent for too long."""
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        try:
            while line := self._lines.readline(_MAX_MESSAGE):
                # A heartbeat is a line with null.
                if line != b"null\n":
                    yield json.loads(line)
        except TimeoutError:
            self.is_silent = True
        except (OSError, ValueError, RecursionError):  # ValueError: this end was closed, or the message is not JSON
            pass
        finally:
            self._closed.set()
            self._lines.close()

    @property
    def is_closed(self) -> bool:
        """Whether the other end has closed the connection, as far as this can be detected without consuming data."""
        waiting = select.poll()
        waiting.register(self._socket, select.POLLIN)
        # MSG_PEEK does not consume data. An empty result is an end of file.
        try:
            return bool(waiting.poll(0)) and self._socket.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    @property
    def host(self) -> str:
        """The address of the other end, or an empty string if it has none."""
        with contextlib.suppress(OSError, IndexError):
            return str(self._socket.getpeername()[0])
        return ""

    def wait_closed(self, seconds: float) -> None:
        """Blocks until the other end has closed the connection, or for at most `seconds`."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Closes the connection. The other end receives an end of file."""
        self._closed.set()
        # A shutdown wakes a thread that is blocked in a read.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._lines.close()

    def _first_line(self, deadline: float) -> bytes:
        """Reads one line, byte by byte, so that no data after it is consumed."""
        line = bytearray()
        try:
            while not line.endswith(b"\n") and len(line) < _MAX_IDENTIFICATION:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                if not (byte := self._socket.recv(1)):
                    break
                line += byte
        finally:
            self._socket.settimeout(self._silence)
        return bytes(line)

    def _send_heartbeats(self) -> None:
        """Sends heartbeats (`null`) until the connection is closed."""
        while not self._closed.wait(_HEARTBEAT_SECONDS):
            self.send(None)


# Rendezvous: process 0


class Rendezvous:
    """The rendezvous on process 0. Each connection is identified in its own thread, so a silent one delays no other.

    Args:
      token: the first message of a process of this run. Connections that send another are closed.
      count: the number of processes, including process 0.
    """

    def __init__(self, token: bytes, count: int):
        self._token, self._count = token, count
        self._arriving = threading.Lock()
        self._connections: dict[int, Connection] = {}
        self._complete = False
        self._reported_hosts: set[str] = set()
        self._identifications = threading.BoundedSemaphore(count + _MAX_UNIDENTIFIED)

    def accept(self, listener: socket.socket, *, timeout: float = TIMEOUT_SECONDS) -> dict[int, Connection]:
        """Returns a connection to each other process. They may arrive at any time and in any order.

        Raises:
          UserError: some are still missing after `timeout` seconds. The others receive the same message.
        """
        listener.settimeout(_POLL_SECONDS)
        wait = _Wait(timeout)

        while missing := self._missing():
            # The listener has a short timeout, so that disconnected processes and the time limit are noticed.
            # A ConnectionError means that an unrelated client has disconnected already.
            with contextlib.suppress(TimeoutError, ConnectionError):
                self._identify_in_a_thread(listener.accept()[0])

            if wait.expired:
                message = f"{_named(missing)} of {self._count} did not arrive within {timeout:.0f} seconds"
                message += "; start each on its host, with the same --coordinator and --processes"
                self._dismiss(message)
                raise UserError(message)

            if wait.report_due:
                print_error_unbuffered(f"process 0: waiting for {_named(missing)} of {self._count}")

        # No process continues before all have arrived.
        for connection in self._connections.values():
            connection.send(["go"])
        return self._connections

    def _missing(self) -> list[int]:
        """Returns the indices of the processes that are not connected; empty once the rendezvous is complete."""
        with self._arriving:
            if self._complete:
                return []

            # A process that has left may be started again, and then arrives again.
            for index in [index for index, connection in self._connections.items() if connection.is_closed]:
                self._connections.pop(index).close()
            return [index for index in range(1, self._count) if index not in self._connections]

    def _identify_in_a_thread(self, sock: socket.socket) -> None:
        """Identifies a connection in a thread, or closes it if too many are unidentified."""
        if not self._identifications.acquire(blocking=False):
            sock.close()
            return
        threading.Thread(target=self._identify, args=(sock,), daemon=True).start()

    def _identify(self, sock: socket.socket) -> None:
        """Identifies a connection by its first message."""
        connection = Connection(sock)
        try:
            match connection.receive(_IDENTIFY_SECONDS):
                # A boolean is an int in Python, but not a process index.
                case [str(token), int(index), *details] if self._knows(token) and not isinstance(index, bool):
                    self._arrive(connection, index, details)
                case _:
                    self._drop(connection)
        finally:
            self._identifications.release()

    def _knows(self, token: str) -> bool:
        """Whether `token` is that of this run. The comparison takes constant time."""
        return hmac.compare_digest(token.encode(errors="replace"), self._token.hex().encode())

    def _arrive(self, connection: Connection, index: int, details: list[object]) -> None:
        """Accepts a process, or refuses it if its flags contradict those of process 0."""
        count = details[0] if details else self._count
        if count != self._count:
            _refuse(connection, f"process {index} was started with --processes {count}, process 0 with {self._count}")
        elif not 0 < index < self._count:
            _refuse(connection, f"two processes were started as --process {index}")
        else:
            self._keep(connection, index)

    def _keep(self, connection: Connection, index: int) -> None:
        """Keeps the connection of a process that arrived.

        If an index arrives twice, its process was restarted or two processes have the same index. The later one is
        kept, except that a complete rendezvous accepts no further process.
        """
        with self._arriving:
            before = connection if self._complete else self._connections.get(index)
            if not self._complete:
                self._connections[index] = connection
                self._complete = len(self._connections) == self._count - 1

        # Refused outside the lock, because sending may block.
        if before is not None:
            where = " and ".join(sorted({before.host, connection.host}))
            _refuse(before, f"two processes were started as --process {index} (on {where})")

    def _drop(self, connection: Connection) -> None:
        """Closes a connection of an unrelated program, with one warning per host."""
        host = connection.host
        connection.close()
        if host and host not in self._reported_hosts:
            self._reported_hosts.add(host)
            print_error_unbuffered(f"process 0: closed a connection from {host}, which is not a process of this run")

    def _dismiss(self, message: str) -> None:
        """Sends a refusal to all connected processes."""
        with self._arriving:
            for connection in self._connections.values():
                connection.send(["refused", message])
                connection.close()


# Rendezvous: other processes


def reach_coordinator(
    address: tuple[str, int], token: bytes, index: int, count: int, *, timeout: float = TIMEOUT_SECONDS
) -> Connection:
    """Returns a connection to process 0, once process 0 reports that all processes have arrived.

    Raises:
      UserError: process 0 does not answer for `timeout` seconds, or refuses this process.
    """
    where = f"process 0 at {address[0]}:{address[1]}"
    wait = _Wait(timeout)

    while True:
        # Process 0 may start later than this one, so a failed connection is tried again.
        reason = "it closed the connection"
        try:
            connection = Connection(socket.create_connection(address, timeout=_CONNECT_SECONDS))
        except OSError as error:
            reason = error.strerror or str(error)
        else:
            connection.send([token.hex(), index, count])
            # Process 0 answers once all have arrived, or when its own time limit expires.
            match connection.receive(timeout + _CONNECT_SECONDS):
                case ["go"]:
                    return connection
                case ["refused", str(message)]:
                    connection.close()
                    raise UserError(message)
            connection.close()

        if wait.expired:
            raise UserError(
                f"{where} did not answer within {timeout:.0f} seconds ({reason}); start it there, and let the port "
                "through the firewall"
            )

        if wait.report_due:
            print_error_unbuffered(f"process {index}: waiting for {where} ({reason})")

        time.sleep(_RETRY_SECONDS)


class _Wait:
    """Tracks when to report that a process is still missing, and when to give up."""

    def __init__(self, timeout: float):
        self._start = self._last = time.monotonic()
        self._timeout = timeout

    @property
    def expired(self) -> bool:
        """Whether the time limit is exceeded."""
        return time.monotonic() - self._start > self._timeout

    @property
    def report_due(self) -> bool:
        """Whether a report is due. If so, reading this property restarts the interval."""
        is_due = time.monotonic() - self._last > _REPORT_SECONDS
        if is_due:
            self._last = time.monotonic()
        return is_due


# Rendezvous: messages


def _refuse(connection: Connection, message: str) -> None:
    """Refuses a process, with one line on both ends."""
    message += "; start all processes with the same command, each with its own --process"
    print_error_unbuffered(f"process 0: {message}")
    connection.send(["refused", message])
    connection.close()


def _named(indices: Iterable[int]) -> str:
    """Returns the processes as text, at most 8 of them."""
    indices = list(indices)
    if len(indices) == 1:
        return f"process {indices[0]}"
    return f"processes {at_most([str(index) for index in indices], 8)}"
