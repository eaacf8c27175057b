"""Writes TensorBoard event files.

TensorBoard's own writer passes events to a thread, which ends with a traceback if the disk refuses a write.
"""

import socket
import struct
import time
from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from looplm_jax.files import AnyPath, make_folder, writing
from looplm_jax.training.growing_file import GrowingFile, grow

_FORMAT = "brain.Event:2"


def open_events(folder: AnyPath, *, step: int) -> "EventLog":
    """Creates an event file in `folder`. Raises UserError if the disk or the bucket refuses it."""
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.from-{step}"
    with writing(folder):
        make_folder(folder)
    return EventLog(grow(folder / name), step=step)


class EventLog:
    """An event file with events after `step`. TensorBoard hides later events of earlier files.

    Args:
      file: the file.
      step: the step from which the run continues.
    """

    def __init__(self, file: GrowingFile, *, step: int):
        self.file = file
        self._append(Event(wall_time=time.time(), file_version=_FORMAT))
        self._append(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one event with all `scalars`."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        """Writes a record: length, checksum of the length, event, checksum of the event."""
        content = event.SerializeToString()
        length = struct.pack("<Q", len(content))
        self.file.append(length + _checksum(length) + content + _checksum(content))


def _checksum(content: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(content))
