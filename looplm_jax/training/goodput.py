"""Accounts for the time of a run by activity. The goodput is the fraction of the time spent in train steps."""

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from looplm_jax.strict_json import number

_PREFIX = "seconds_in_"
_WORTH_A_WARNING = 0.05
_LONG_ENOUGH = 300.0  # seconds; shorter runs are dominated by their start


class Activity(enum.Enum):
    """An activity that takes time. Waiting for input counts only while the devices are idle."""

    STEP = "step"
    COMPILE = "compile"
    SAVE = "save"
    RESTORE = "restore"
    INPUT = "input"
    EVALUATION = "evaluation"
    OTHER = "other"


_REMEDIES = {
    Activity.INPUT: "waiting for input: tokenize the data beforehand, or put it on a faster disk",
    Activity.SAVE: "saving: raise checkpoint.every, or save to a faster disk",
    Activity.COMPILE: "compiling: keep programs on a disk with JAX_COMPILATION_CACHE_DIR, or raise stage.min_loops",
}


class Stopwatch:
    """Divides the time since its creation among activities. Every moment is counted exactly once.

    Args:
      clock: returns the current time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last = clock()
        self._seconds = dict.fromkeys(Activity, 0.0)
        self._read_out = dict.fromkeys(Activity, 0.0)

    def charge(self, activity: Activity) -> None:
        """Attributes the time since the last charge to `activity`."""
        now = self._clock()
        self._seconds[activity] += now - self._last
        self._last = now

    def total(self) -> dict[Activity, float]:
        """Returns the seconds of every activity."""
        return dict(self._seconds)

    def read_out(self) -> dict[str, float]:
        """Returns the seconds of every activity since the last call, as fields of a line of metrics."""
        new = {activity: self._seconds[activity] - self._read_out[activity] for activity in Activity}
        self._read_out = dict(self._seconds)
        return {f"{_PREFIX}{activity.value}": round(seconds, 3) for activity, seconds in new.items()}


def total_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[Activity, float]:
    """Returns the seconds of every activity, summed over the metrics of all processes that continued the run.

    Args:
      rows: the lines of `metrics.jsonl`.
    """

    def total(name: str) -> float:
        return sum(filter(math.isfinite, (number(row.get(name)) for row in rows)))

    return {activity: total(f"{_PREFIX}{activity.value}") for activity in Activity}


def shares(seconds: Mapping[Activity, float]) -> dict[Activity, float]:
    """Returns the fraction of the time that each activity took, or an empty dictionary if no time has passed."""
    total = sum(seconds.values())
    return {activity: spent / total for activity, spent in seconds.items()} if total > 0 else {}


def summary(seconds: Mapping[Activity, float]) -> str:
    """Returns one line with the total time and the fraction of each activity of at least 0.05 %."""
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    parts = [f"{activity.value} {share:.1%}" for activity, share in shares(seconds).items() if share >= 0.0005]
    return f"time {minutes}:{rest:02d}: {', '.join(parts)}"


def warnings(seconds: Mapping[Activity, float]) -> list[str]:
    """Returns a warning for each activity that took more than a twentieth of a long run, with a remedy.

    Runs shorter than five minutes have none.
    """
    if sum(seconds.values()) < _LONG_ENOUGH:
        return []

    found = shares(seconds)
    return [
        f"{found[activity]:.0%} of the time went into {remedy}"
        for activity, remedy in _REMEDIES.items()
        if found[activity] > _WORTH_A_WARNING
    ]
