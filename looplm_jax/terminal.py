"""Terminal output: text from others cannot control the terminal, and a closed stream does not end the program.

Tables are for the terminal and for Markdown.
"""

import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# C0 and C1 control characters, marks that change the direction of text, and lone surrogates (undecodable bytes of file
# names).
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# Text


def with_escapes(text: str, *, keep: str = "\n\t") -> str:
    r"""Returns the text with each character that controls a terminal as an escape, for example `\x1b`.

    Args:
      text: any text.
      keep: characters to leave unchanged.
    """
    return _STEERING.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def literal(text: str) -> str:
    """Returns the text such that Rich prints it unchanged: with escapes, and without markup."""
    from rich.markup import escape

    return escape(with_escapes(text))


def one_line(message: str) -> str:
    """Returns the message as a single line with escapes."""
    return with_escapes(" ".join(message.split()), keep="")


def show(text: str) -> None:
    """Prints the text with escapes on standard output."""
    print(with_escapes(text))


def print_error(message: str) -> None:
    """Prints one line on standard error. Does nothing if that is closed."""
    with contextlib.suppress(OSError, ValueError):
        print(f"looplm: {one_line(message)}", file=sys.stderr, flush=True)


def print_error_unbuffered(message: str) -> None:
    """Prints one line on standard error without Python's buffers, from any thread.

    This is for a process that is about to exit.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"looplm: {one_line(message)}\n".encode(errors="backslashreplace"))


# Tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A title, column heads, and rows of text; one row may be marked."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: int | None = None

    def rich(self) -> "RichTable":
        """Returns the table for a terminal; the marked row is bold."""
        from rich.table import Table as RichTable

        table = RichTable(title=literal(self.title), title_justify="left")
        for column in self.columns:
            table.add_column(literal(column), justify="right")
        for index, row in enumerate(self.rows):
            table.add_row(*map(literal, row), style="bold" if index == self.marked else None)
        return table

    def markdown(self) -> str:
        """Returns the table as Markdown, without the title; the marked row is bold."""
        rows = [
            [f"**{cell}**" if cell and index == self.marked else cell for cell in row]
            for index, row in enumerate(self.rows)
        ]
        return markdown_table(self.columns, rows, right=[True] * len(self.columns))


def markdown_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[bool] | None = None
) -> str:
    """Returns a Markdown table, with each cell on one line.

    Args:
      columns: the heads of the columns.
      rows: the cells, row by row. Integers get thousands separators.
      right: for each column, whether it is aligned to the right; None aligns none of them.
    """
    alignments = ["---"] * len(columns) if right is None else ["---:" if to_right else "---" for to_right in right]
    lines = [columns, alignments, *rows]
    return "".join(f"| {' | '.join(map(_markdown_cell, line))} |\n" for line in lines)


def _markdown_cell(value: object) -> str:
    """Returns a value as the content of a cell: on one line, because a line is a row."""
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


# Streams


def harden_streams() -> None:
    """Makes standard output and error robust for the lifetime of the process.

    Characters that they cannot encode are replaced. Output to a closed pipe is dropped, so `looplm train 2>&1 | head`
    continues to train. A stream that was closed before the program started is connected to the null device, so that no
    other file gets its descriptor.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            _open_nowhere(number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif number > 0 and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _steady(stream, number))


def _steady(stream: TextIO, number: int) -> TextIO:
    """Returns a robust replacement of a stream."""
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number)),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors="replace" if number == 1 else "backslashreplace",
        line_buffering=number == 2 or stream.isatty(),
    )


class _Pipe(io.RawIOBase):
    """Standard output or error, without errors of a closed pipe. Standard error raises no errors at all.

    The error of a full disk is raised only once, because Python would try to write again when the process ends.
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
            # The data is dropped: the reader is gone, the error was raised before, or the stream is standard error.
            return len(data)


def _open_nowhere(number: int) -> None:
    """Opens a descriptor on the null device if it is closed."""
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


# Signals


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns SIGTERM, and SIGINT and SIGHUP unless this process was started with them ignored.

    `nohup` starts a command with SIGHUP ignored, and shell scripts start background jobs with SIGINT ignored, so that
    signals from the terminal do not end them.
    """
    from_terminal = (number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN)
    return (signal.SIGTERM, *from_terminal)
