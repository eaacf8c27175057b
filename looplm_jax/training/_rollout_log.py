"""The log of rollouts: some of the answers of every step, in `rollouts.jsonl` of the run folder."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from looplm_jax import json_io
from looplm_jax.files import AnyPath, check_regular, report_failed_reads
from looplm_jax.training._loggers import open_append_only

ROLLOUTS = "rollouts.jsonl"


class RolloutLog:
    """Appends answers to `rollouts.jsonl`.

    Lines after `step` are removed on opening, because the resumed run writes them again. So is an incomplete last line.

    Args:
      folder: the run folder.
      step: the step from which the run continues.
    """

    def __init__(self, folder: AnyPath, *, step: int):
        path = folder / ROLLOUTS
        with report_failed_reads(path):
            lines: list[bytes] = []
            if path.exists():
                check_regular(path)
                lines = path.read_bytes().split(b"\n")[:-1]
        kept = [line + b"\n" for line in lines if _step(line) <= step]
        self._file = open_append_only(path, b"".join(kept))

    def write(self, step: int, lines: Sequence[Mapping[str, Any]]) -> None:
        """Appends the answers of a step."""
        self._file.write("".join(f"{json_io.dumps({'step': step, **line})}\n" for line in lines).encode())

    def flush(self) -> None:
        """Stores all lines written so far."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step(line: bytes) -> float:
    """Returns the step of a line, or infinity for a line that is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
