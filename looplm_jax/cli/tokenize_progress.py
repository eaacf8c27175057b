"""Progress of `looplm tokenize`: a bar on a terminal, occasional lines elsewhere."""

import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from looplm_jax.data.prepared.pool import Progress as Advance
from looplm_jax.training._progress import progress_console

_SECONDS_BETWEEN_LINES = 15.0


class TokenizeProgress:
    """Documents, tokens, text per second and time left, over all work units of a pass."""

    def __init__(self, console: Console | None = None):
        self._console = console or progress_console()
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            DownloadColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )

        self._what = ""
        self._total = self._done = self._before = 0
        self._documents = self._tokens = self._bytes = 0
        self._started = self._last_line = 0.0

    def __enter__(self) -> "TokenizeProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._console.print(line)

    def begin(self, what: str, *, bytes: int, done: int) -> None:
        """Starts a pass over all work units: `bytes` of files in total, `done` of them finished by earlier runs."""
        self._what, self._total, self._done, self._before = what, bytes, done, done
        self._documents = self._tokens = self._bytes = 0
        self._started = self._last_line = time.monotonic()

        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._task = self._bar.add_task(what, total=bytes, completed=done, status="")

        again = f", {done:,} of them done before" if done else ""
        self._console.print(f"{what}: {bytes:,} bytes of files{again}")

    def advance(self, progress: Advance) -> None:
        """Adds the progress of a worker."""
        self._documents += progress.documents
        self._tokens += progress.tokens
        self._bytes += progress.bytes
        self._show()

    def finish_unit(self, bytes: int) -> None:
        """Records that a work unit with this many bytes of files is finished."""
        self._done += bytes
        self._show()

    def _show(self) -> None:
        """Updates the bar; without a terminal, prints a line if the last one is old enough."""
        now = time.monotonic()
        # The clock may not have advanced.
        seconds = max(now - self._started, 1e-9)
        status = (
            f"{self._documents:,} documents  {self._tokens:,} tokens  {self._bytes / seconds / 1e6:.1f} MB/s  "
            f"{self._time_left(seconds)} left"
        )
        self._bar.update(self._task, completed=self._done, status=status)

        if not self._console.is_terminal and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._console.print(f"{self._what}  {self._done / max(self._total, 1):.0%}  {status}")

    def _time_left(self, seconds: float) -> str:
        """Returns the estimated time left, based on finished work units; unknown before the first one."""
        # Work of earlier runs says nothing about the speed of this one.
        finished = self._done - self._before
        if not finished:
            return "?"
        minutes, rest = divmod(round(seconds / finished * (self._total - self._done)), 60)
        return f"{minutes}:{rest:02d}"
