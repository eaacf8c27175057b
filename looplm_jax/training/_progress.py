"""Progress on the console: a bar on a terminal, and one line at intervals elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from looplm_jax.terminal import with_escapes

B = TypeVar("B", bound="ProgressBar")

# Without a terminal the output is usually a log, in which a line per step would hide everything else.
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
        # Names of files, sources and stages may contain control characters.
        super().print(*(with_escapes(each) if isinstance(each, str) else each for each in objects), **options)


class ProgressBar:
    """A bar on a terminal and a line at intervals elsewhere, as a context manager.

    Args:
      console: the console.
      columns: the columns of the bar, after its description.
    """

    def __init__(self, console: Console, *columns: ProgressColumn):
        self._console = console
        # So that the first line is printed at once.
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            *columns,
            console=console,
            disable=console.quiet or not console.is_terminal,
            # Removed at its end, so that the lines above it remain as the record of the run.
            transient=True,
        )

    def __enter__(self: B) -> B:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text)

    def _say_at_intervals(self, text: str, *, now: bool = False) -> None:
        """Prints a line where there is no bar, if the last one is old enough or if `now`."""
        seconds = time.monotonic()
        if not self._console.is_terminal and (now or seconds - self._last_line >= _SECONDS_BETWEEN_LINES):
            self._last_line = seconds
            self.say(text)


class TrainingProgress(ProgressBar):
    """Progress over all steps of a run.

    Args:
      console: the console.
      total_steps: the number of steps of the run.
      step: the step from which the run continues.
    """

    def __init__(self, console: Console, *, total_steps: int, step: int):
        status = TextColumn("{task.fields[status]}")
        super().__init__(
            console, MofNCompleteColumn(), status, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        )
        self._total = total_steps
        # The time left is estimated from the steps of this process alone.
        self._started, self._first = time.monotonic(), step
        self._task = self._bar.add_task("", total=total_steps, completed=step, status="")

    def warn(self, text: str) -> None:
        """Prints a highlighted line above the bar."""
        self._console.print(text, style="yellow")

    def update(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Shows the latest metrics. `step` counts from the start of the run."""
        status = f"{_learned(values)}  {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, description=with_escapes(stage), status=status)

        seconds = time.monotonic() - self._started
        left = time_left(seconds, done=max(step - self._first, 1), rest=self._total - step)
        self._say_at_intervals(f"{stage}  step {step}/{self._total}  {status}  {left} left", now=step == self._total)


def _learned(values: Mapping[str, Any]) -> str:
    """Returns what the objective of a step learned, in words."""
    if "rollout_gap" in values:
        return (
            f"reward {values['reward']:.2f}  answers right {values['share_right']:.2f}  "
            f"loops {values['mean_exit_loop']:.2f}  gap {values['rollout_gap']:.0e}"
        )
    # LoopRPT also has a reward, and learns from a share of the tokens.
    reward = f"reward {values['reward']:.3f}  hard {values['hard_share']:.0%}  " if "reward" in values else ""
    return f"loss {values['loss']:.3f}  {reward}exits at {values['mean_exit_loop']:.2f} loops"


def time_left(seconds: float, *, done: int, rest: int) -> str:
    """Returns the time for `rest` units as `minutes:seconds`, if `done` units took this many seconds."""
    minutes, left = divmod(round(seconds / done * rest), 60)
    return f"{minutes}:{left:02d}"
