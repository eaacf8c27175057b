"""TensorBoard events, written by the thread that asks for it.

The usual writer of tensorboardX hands them to a thread of its own: where the disk refuses, that thread dies with a
traceback, and the run waits for it for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

_SECONDS_BETWEEN_FLUSHES = 5.0


class EventLog:
    """A new file of events in `folder`. TensorBoard then hides the events of earlier files after `step`."""

    def __init__(self, folder: Path, *, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".from-{step}")
        self._next_flush = 0.0
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One event with all `scalars`."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step, summary=Summary(value=values))

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, step: int, **content: Summary | SessionLog) -> None:
        self._writer.write_event(Event(wall_time=time.time(), step=step, **content))
        if time.monotonic() >= self._next_flush:  # it waits for the disk, which may take longer than a small step
            self._writer.flush()
            self._next_flush = time.monotonic() + _SECONDS_BETWEEN_FLUSHES
