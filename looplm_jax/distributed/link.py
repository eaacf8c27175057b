"""A TCP connection between two processes that carries newline-delimited JSON and a heartbeat."""

import contextlib
import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

_BEAT_SECONDS = 5.0
_LONGEST_GREETING = 1000
_LONGEST_MESSAGE = 2**26  # bytes; far more than any value that processes exchange
SILENCE_SECONDS = 60.0  # without a heartbeat for this long, the other process is considered lost


class Link:
    """One end of a connection. Any thread may send; only one thread may receive.

    Args:
      connection: a connected socket.
      silence: the seconds without a heartbeat after which the other end is considered lost.
    """

    def __init__(self, connection: socket.socket, *, silence: float = SILENCE_SECONDS):
        connection.settimeout(silence)
        with contextlib.suppress(OSError):  # low latency for small messages; socket pairs have no TCP options
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        self._connection, self._silence = connection, silence
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.silent = False  # True if the other end stopped sending without closing the connection

    def send(self, message: Any) -> None:
        """Sends a JSON value. Does nothing if the connection is lost; the receiving thread detects that."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

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
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            while line := self._lines.readline(_LONGEST_MESSAGE):
                # A heartbeat is a line with null.
                if line != b"null\n":
                    yield json.loads(line)
        except TimeoutError:
            self.silent = True
        except (OSError, ValueError, RecursionError):  # ValueError: this end was closed, or the message is not JSON
            pass
        finally:
            self._closed.set()
            self._lines.close()

    @property
    def broken(self) -> bool:
        """Whether the other end has closed the connection, as far as this can be detected without consuming data."""
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        # MSG_PEEK does not consume data. An empty result is an end of file.
        try:
            return bool(waiting.poll(0)) and self._connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    @property
    def host(self) -> str:
        """The address of the other end, or an empty string if it has none."""
        with contextlib.suppress(OSError, IndexError):
            return str(self._connection.getpeername()[0])
        return ""

    def wait_closed(self, seconds: float) -> None:
        """Blocks until the other end has closed the connection, or for at most `seconds`."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Closes the connection. The other end receives an end of file."""
        self._closed.set()
        # A shutdown wakes a thread that is blocked in a read.
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._lines.close()

    def _first_line(self, deadline: float) -> bytes:
        """Reads one line, byte by byte, so that no data after it is consumed."""
        line = bytearray()
        try:
            while not line.endswith(b"\n") and len(line) < _LONGEST_GREETING:
                self._connection.settimeout(max(deadline - time.monotonic(), 1e-3))
                if not (byte := self._connection.recv(1)):
                    break
                line += byte
        finally:
            self._connection.settimeout(self._silence)
        return bytes(line)

    def _beat(self) -> None:
        """Sends heartbeats (`null`) until the connection is closed."""
        while not self._closed.wait(_BEAT_SECONDS):
            self.send(None)
