"""A connection between two processes: JSON values, one a line, and a heartbeat."""

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
_LONGEST_MESSAGE = 2**26  # bytes; what processes agree on is far shorter
SILENCE_SECONDS = 60.0  # a process without a heartbeat for this long is gone, even if its connection is still open


class Link:
    """One end of a connection. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket, *, silence: float = SILENCE_SECONDS):
        connection.settimeout(silence)
        with contextlib.suppress(OSError):  # small messages that someone waits for; a socket pair knows no TCP
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection, self._silence = connection, silence
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()
        self.silent = False  # set: the other end stopped sending without closing the connection

    def send(self, message: Any) -> None:
        """Sends a JSON value. Does nothing if the other end is gone: the thread that receives learns that."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float) -> Any:
        """Returns the first message, or None if none arrives in time: the other end may be a stranger.

        Reads neither more than a bounded number of bytes nor longer than `seconds`, however slowly they come.
        """
        try:
            return json.loads(self._first_line(time.monotonic() + seconds))
        except (OSError, ValueError, RecursionError):
            return None

    def received(self) -> Iterator[Any]:
        """Messages until the other end is gone, or silent for too long. Heartbeats are left out."""
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            while line := self._lines.readline(_LONGEST_MESSAGE):
                if line != b"null\n":
                    yield json.loads(line)
        except TimeoutError:
            self.silent = True
        except (OSError, ValueError, RecursionError):  # ValueError: this end was closed, or the other sent no JSON
            pass
        finally:
            self._closed.set()
            self._lines.close()

    @property
    def broken(self) -> bool:
        """Whether the other end has closed the connection, as far as can be known without reading from it."""
        waiting = select.poll()
        waiting.register(self._connection, select.POLLIN)
        try:
            return bool(waiting.poll(0)) and self._connection.recv(1, socket.MSG_PEEK) == b""
        except OSError:
            return True

    @property
    def host(self) -> str:
        """The address of the other end, or an empty string where it has none."""
        with contextlib.suppress(OSError, IndexError):
            return str(self._connection.getpeername()[0])
        return ""

    def wait_closed(self, seconds: float) -> None:
        """Returns once the other end is gone, or after `seconds`."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Tells the other end that nothing more will come."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._lines.close()

    def _first_line(self, deadline: float) -> bytes:
        """One byte at a time, so that nothing behind the line is read."""
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
        while not self._closed.wait(_BEAT_SECONDS):
            self.send(None)
