"""A connection between two processes: JSON values, one a line, and a sign of life now and then."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

_BEAT_SECONDS = 5.0
_LONGEST_GREETING = 1000
SILENCE_SECONDS = 60.0  # a process that says nothing for so long is gone, even if its connection stands


class Link:
    """One end of a connection. Any thread may send; one thread receives."""

    def __init__(self, connection: socket.socket, *, silence: float = SILENCE_SECONDS):
        connection.settimeout(silence)
        with contextlib.suppress(OSError):  # small messages that someone waits for; a socket pair knows no TCP
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._lines = connection.makefile("rb")
        self._sending = threading.Lock()
        self._closed = threading.Event()

    def send(self, message: Any) -> None:
        """Nothing happens where the other end is gone: whoever receives here learns that."""
        with contextlib.suppress(OSError), self._sending:
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Any:
        """The first message, None where there is none: whoever calls may be a stranger."""
        try:
            return json.loads(self._lines.readline(_LONGEST_GREETING))
        except (OSError, ValueError):
            return None

    def received(self) -> Iterator[Any]:
        """Messages until the other end is gone or silent for too long. Signs of life are left out."""
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            for line in self._lines:
                if line != b"null\n":
                    yield json.loads(line)
        except (OSError, ValueError):  # ValueError: this end was closed meanwhile, or the other sends no JSON
            pass
        finally:
            self._closed.set()
            self._lines.close()

    def wait_closed(self, seconds: float) -> None:
        """Until the other end is gone, or so many seconds at most."""
        self._closed.wait(seconds)

    def close(self) -> None:
        """Let the other end know that nothing more will come."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._lines.close()

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            self.send(None)
