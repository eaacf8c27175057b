"""What this package prints: text that others wrote never steers a terminal, and no stream ends the work."""

import contextlib
import errno
import io
import os
import re
import sys
from typing import TextIO

# C0 and C1 control characters, marks that reverse the direction of text, and lone surrogates (bytes of a file name).
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns the text with each character that steers a terminal as an escape, `\x1b` for example.

    Args:
      text: any text.
      keep: characters that are left as they are.
    """
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def literal(text: str) -> str:
    """Returns the text such that Rich shows it as it is: visible, and without markup."""
    from rich.markup import escape

    return escape(visible(text))


def one_line(message: str) -> str:
    """Returns the message as a single visible line."""
    return visible(" ".join(message.split()), keep="")


def show(text: str) -> None:
    """Prints the text, visible, on standard output."""
    print(visible(text))


def complain(message: str) -> None:
    """Prints one line on standard error. Nothing happens if that is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"looplm: {one_line(message)}", file=sys.stderr, flush=True)


def complain_at_once(message: str) -> None:
    """The same past Python's buffers, from any thread, for a process that is about to end."""
    with contextlib.suppress(OSError):
        os.write(2, f"looplm: {one_line(message)}\n".encode(errors="backslashreplace"))


def steady_streams() -> None:
    """Makes standard output and error take any text for as long as the process runs.

    What they cannot encode is replaced. A reader that goes away is not noticed: `looplm train 2>&1 | head` still
    trains. A stream that was closed before the program started leads nowhere, and no file gets its number.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            _open_nowhere(number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number > 0 and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _steady(stream, number))


def _steady(stream: TextIO, number: int) -> TextIO:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number)),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors="replace" if number == 1 else "backslashreplace",
        line_buffering=number == 2 or stream.isatty(),
    )


class _Pipe(io.RawIOBase):
    """Standard output or error, without the errors of a reader that is gone; of standard error, without any.

    What a full disk refuses is raised once: Python would try again to write it when the process ends.
    """

    def __init__(self, number: int):
        self._number = number
        self._raised = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: "bytes | bytearray | memoryview", /) -> int:  # type: ignore[override]
        try:
            return os.write(self._number, data)
        except OSError as error:
            if self._number == 1 and error.errno != errno.EPIPE and not self._raised:
                self._raised = True
                raise
            return len(data)


def _open_nowhere(number: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
