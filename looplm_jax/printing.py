"""Text that others wrote, as it may be shown: a terminal must never obey it."""

import contextlib
import io
import os
import re
import sys

# C0 and C1 control characters, marks that reverse the direction of text, and lone surrogates (bytes of a file name).
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns the text with each character that steers a terminal as an escape, `\x1b` for example.

    Args:
      text: any text.
      keep: characters that are left as they are.
    """
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def one_line(message: str) -> str:
    """Returns the message as a single visible line."""
    return visible(" ".join(message.split()), keep="")


def say(message: str) -> None:
    """Prints one line on standard error, from any thread. Nothing happens where standard error is gone."""
    with contextlib.suppress(OSError):
        os.write(2, f"looplm: {one_line(message)}\n".encode(errors="backslashreplace"))


def survive_any_output() -> None:
    """Makes standard output and error take every text: what they cannot encode is replaced.

    A stream that was closed before the program started becomes one that leads nowhere, so that no file which is opened
    later gets its number.
    """
    _open_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _open_standard_descriptors() -> None:
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        stream = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(io.BufferedReader(stream) if number == 0 else io.BufferedWriter(stream)))


def _escape(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
