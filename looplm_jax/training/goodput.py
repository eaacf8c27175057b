"""Where the time of a run goes: its goodput is the share spent in steps."""

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from looplm_jax.strict_json import number

_PREFIX = "seconds_in_"
_WORTH_A_WARNING = 0.05
_LONG_ENOUGH = 300.0  # seconds; the shares of a shorter run say nothing about a long one


class Activity(enum.Enum):
    """What the time went to; a wait for input counts only where the devices had nothing left to do."""

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
    """Divides the time since it was made among activities: no moment is counted twice, none is left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._last = clock()
        self._seconds = dict.fromkeys(Activity, 0.0)
        self._read_out = dict.fromkeys(Activity, 0.0)

    def charge(self, activity: Activity) -> None:
        """The time since the last charge went to `activity`."""
        now = self._clock()
        self._seconds[activity] += now - self._last
        self._last = now

    def total(self) -> dict[Activity, float]:
        """The seconds of every activity."""
        return dict(self._seconds)

    def read_out(self) -> dict[str, float]:
        """The seconds of every activity since this was asked last, as fields of a line of the metrics."""
        new = {activity: self._seconds[activity] - self._read_out[activity] for activity in Activity}
        self._read_out = dict(self._seconds)
        return {f"{_PREFIX}{activity.value}": round(seconds, 3) for activity, seconds in new.items()}


def total_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[Activity, float]:
    """The seconds of every activity, over the lines that all processes of a run wrote one after the other."""

    def total(name: str) -> float:
        return sum(filter(math.isfinite, (number(row.get(name)) for row in rows)))

    return {activity: total(f"{_PREFIX}{activity.value}") for activity in Activity}


def shares(seconds: Mapping[Activity, float]) -> dict[Activity, float]:
    """The part of the time that each activity took; none where there was no time."""
    total = sum(seconds.values())
    return {activity: spent / total for activity, spent in seconds.items()} if total > 0 else {}


def summary(seconds: Mapping[Activity, float]) -> str:
    """One line: how long, and the shares of all that took any time."""
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    parts = [f"{activity.value} {share:.1%}" for activity, share in shares(seconds).items() if share >= 0.0005]
    return f"time {minutes}:{rest:02d}: {', '.join(parts)}"


def warnings(seconds: Mapping[Activity, float]) -> list[str]:
    """In words, what ate more than a twentieth of a run of some length, and what to do about it."""
    if sum(seconds.values()) < _LONG_ENOUGH:
        return []
    found = shares(seconds)
    return [
        f"{found[activity]:.0%} of the time went into {remedy}"
        for activity, remedy in _REMEDIES.items()
        if found[activity] > _WORTH_A_WARNING
    ]
