"""Progress of a run on the console: a bar on a terminal, and one line at intervals elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from looplm_jax.terminal import visible

_SECONDS_BETWEEN_LINES = 15.0


def progress_console(*, quiet: bool = False) -> Console:
    """Returns a console on standard error that prints text unchanged.

    Lines are not wrapped, and `[x]` in a path is not interpreted as markup.

    Args:
      quiet: whether to print nothing, as all but one of several processes do.
    """
    return _Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False, quiet=quiet)


class _Console(Console):
    """A console that escapes control characters, which names in a line may contain."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(each) if isinstance(each, str) else each for each in objects), **options)


class TrainingProgress:
    """Progress over all steps of a run, as a context manager.

    Args:
      console: the console.
      total_steps: the number of steps of the run.
      step: the step from which the run continues.
    """

    def __init__(self, console: Console, *, total_steps: int, step: int):
        self._console = console
        self._total = total_steps
        self._started, self._first = time.monotonic(), step
        self._last_line = -_SECONDS_BETWEEN_LINES

        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
            transient=True,
        )

        self._task = self._bar.add_task("", total=total_steps, completed=step, status="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text)

    def warn(self, text: str) -> None:
        """Prints a highlighted line above the bar."""
        self._console.print(text, style="yellow")

    def update(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Shows the latest metrics. `step` counts from the start of the run."""
        status = (
            f"loss {values['loss']:.3f}  exits at {values['mean_exit_loop']:.2f} loops  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )

        self._bar.update(self._task, completed=step, description=visible(stage), status=status)

        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._total):
            self._last_line = now
            self.say(f"{stage}  step {step}/{self._total}  {status}  {self._time_left(step)} left")

    def _time_left(self, step: int) -> str:
        """Returns the estimated remaining time as `minutes:seconds`."""
        rate = (time.monotonic() - self._started) / max(step - self._first, 1)
        minutes, seconds = divmod(round(rate * (self._total - step)), 60)
        return f"{minutes}:{seconds:02d}"
