"""Records a profiler trace of some steps of a run."""

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import jax

from looplm_jax.errors import UserError
from looplm_jax.files import AnyPath, write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfiledSteps:
    """The steps `first..last` of a run to trace, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfiledSteps":
        """Returns the steps for text such as `10:13`, or `10` for one step. Raises UserError otherwise."""
        # A single number is one step.
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
        if not 1 <= first <= last:
            raise UserError(f"--profile-steps must be FIRST:LAST, such as 10:13, not {text!r}")
        return cls(first=first, last=last)


class Profiler:
    """Traces the requested steps into a folder. In a bucket, the files appear when the trace ends.

    Args:
      folder: the folder of the trace.
      steps: the steps to trace, or None.
    """

    def __init__(self, folder: AnyPath, steps: ProfiledSteps | None):
        self._folder, self._steps = folder, steps
        self._refused: str | None = None
        self._staging: tempfile.TemporaryDirectory[str] | None = None
        self._running = self.traced = False

    def before(self, step: int) -> None:
        """Starts the trace at the first of its steps. Must be called before a step is dispatched."""
        if self._steps is not None and not self.traced and self._steps.first <= step <= self._steps.last:
            self._running = self.traced = True
            if not isinstance(self._folder, Path):
                # The trace is written to a local folder and copied to the bucket at its end.
                try:
                    self._staging = tempfile.TemporaryDirectory()
                except OSError as error:
                    self._running, self._refused = False, f"{error.strerror}; set TMPDIR to a writable folder"
                    return
            jax.profiler.start_trace(self._folder if self._staging is None else self._staging.name)

    def after(self, step: int, results: Any) -> None:
        """Ends the trace after its last step. Must be called after a step is dispatched.

        Args:
          step: the step.
          results: its results. The trace ends when they are ready.
        """
        if self._running and self._steps is not None and step >= self._steps.last:
            # Steps are dispatched ahead of the devices, so the last one may still be running.
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the trace, also if the run stops inside it."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            self._upload()

    def how_to_open(self) -> str | None:
        """Returns a line about how to view the trace, or None if there is none."""
        if not self.traced:
            return None
        if self._refused is not None:
            return f"no profile: {self._refused}"
        return f"profile: pip install xprof, then `xprof --logdir {self._folder}`; or open a .trace.json.gz in Perfetto"

    def _upload(self) -> None:
        """Copies the trace from a temporary folder to the bucket."""
        if self._staging is None:
            return
        with self._staging as staging:
            try:
                for file in (path for path in Path(staging).rglob("*") if path.is_file()):
                    write_atomically(self._folder / file.relative_to(staging).as_posix(), file.read_bytes())
            except UserError as error:  # a refused trace must not end the run
                self._refused = str(error)
