"""Destinations of metrics: append-only files, TensorBoard event files, and Weights & Biases.

Content that the disk or the bucket refuses is kept in memory and written as soon as possible.
"""

import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from etils import epath
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from looplm_jax.errors import UserError
from looplm_jax.files import AnyPath, make_folder, refusal, report_failed_writes, write_atomically

_SECONDS_BETWEEN_UPLOADS = 30.0
_SHARE_OF_TIME = 0.05  # the maximum fraction of the time spent in uploads

# TensorBoard expects it in the first record of a file.
_FORMAT = "brain.Event:2"


# Append-only files


@runtime_checkable
class AppendOnlyFile(Protocol):
    """A file to which a single writer appends.

    Attributes:
      refused: why the last content is not stored, or None if it is.
    """

    refused: str | None

    def write(self, content: bytes) -> None:
        """Appends `content` to the file, possibly with a delay."""

    def flush(self) -> None:
        """Writes everything appended so far now, such that it survives a power failure."""

    def close(self) -> None:
        """Flushes and closes the file."""


def open_append_only(path: AnyPath, content: bytes = b"") -> AppendOnlyFile:
    """Creates a file with this content, replacing any file at `path`.

    Raises:
      UserError: the disk or the bucket refuses it.
    """
    write_atomically(path, content)
    return _LocalFile(path) if isinstance(path, Path) else _BucketFile(path, content)


class _LocalFile:
    """A local file, written immediately. After a partial write, the next attempt continues after the written part."""

    def __init__(self, path: Path):
        self.refused: str | None = None
        self._path, self._pending = path, b""
        with report_failed_writes(path):
            self._file = path.open("ab", buffering=0)

    def write(self, content: bytes) -> None:
        self._pending += content
        self._store(sync=False)

    def flush(self) -> None:
        self._store(sync=True)

    def _store(self, *, sync: bool) -> None:
        try:
            while self._pending:
                # One call may write only a portion.
                # What was written is removed at once, so that an error in the middle leaves only the rest to be
                # retried.
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
            if sync:
                os.fsync(self._file.fileno())
            self.refused = None
        except OSError as error:
            self.refused = refusal(error, self._path)

    def close(self) -> None:
        self.flush()
        self._file.close()


class _BucketFile:
    """An object in a bucket. Objects cannot grow, so a thread and `flush` upload the whole content."""

    def __init__(self, path: epath.Path, content: bytes):
        self.refused: str | None = None
        self._path, self._content, self._stored = path, bytearray(content), len(content)
        self._uploading = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._upload_now_and_then, daemon=True)
        self._thread.start()

    def write(self, content: bytes) -> None:
        self._content += content

    def flush(self) -> None:
        with self._uploading:
            # A copy, because `write` may append during the upload.
            content = bytes(self._content)
            if len(content) == self._stored:
                return
            try:
                self._path.write_bytes(content)
                self._stored, self.refused = len(content), None
            except Exception as error:  # clients of buckets raise many types of errors; none of them may end a run
                self.refused = refusal(error, self._path) or repr(error)

    def close(self) -> None:
        self._closed.set()
        # The last upload must be that of the whole content.
        self._thread.join()
        self.flush()

    def _upload_now_and_then(self) -> None:
        """Uploads at intervals, so that uploads take at most 5 % of the time."""
        pause = _SECONDS_BETWEEN_UPLOADS
        while not self._closed.wait(pause):
            started = time.monotonic()
            self.flush()
            pause = max(_SECONDS_BETWEEN_UPLOADS, (time.monotonic() - started) / _SHARE_OF_TIME)


# TensorBoard. Its own writer passes events to a thread, which ends with a traceback if the disk refuses a write.


def open_events(folder: AnyPath, *, step: int) -> "EventLog":
    """Creates an event file in `folder`. Raises UserError if the disk or the bucket refuses it."""
    # TensorBoard reads the files of a folder in the order of their names, which begin with the time.
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.from-{step}"
    with report_failed_writes(folder):
        make_folder(folder)
    return EventLog(open_append_only(folder / name), step=step)


class EventLog:
    """An event file with events after `step`. TensorBoard hides later events of earlier files.

    Args:
      file: the file.
      step: the step from which the run continues.
    """

    def __init__(self, file: AppendOnlyFile, *, step: int):
        self.file = file
        # Only the framing of records is TensorBoard's; the file handles refused writes.
        self._records = RecordWriter(file)
        self._append(Event(wall_time=time.time(), file_version=_FORMAT))
        self._append(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one event with all `scalars`."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _append(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


# Other destinations


@runtime_checkable
class EventSink(Protocol):
    """A destination of scalars in addition to `metrics.jsonl` and TensorBoard."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes all scalars of a line, under names such as `train/loss`."""

    def close(self) -> None:
        """Closes the destination."""


class WandbLog:
    """The scalars of a run in a Weights & Biases project, which is imported only when this is created.

    Args:
      project: the project.
      name: the name and id of the run. A resumed run continues the run with the same id.
      config: the configuration to record.

    Raises:
      UserError: Weights & Biases is not installed.
    """

    def __init__(self, project: str, *, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs Weights & Biases: `pip install wandb`") from None
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=dict(config))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends one line of metrics."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
