"""Metrics of a run: one JSON object a line, and TensorBoard events beside it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from looplm_jax.errors import UserError
from looplm_jax.training.step import StepMetrics


class MetricsLog:
    """Appends to `metrics.jsonl` and `tensorboard/`.

    Opened at a step, it forgets the lines after it: they will be written again.
    """

    def __init__(self, folder: Path, *, step: int):
        self._path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= step]
        temporary = self._path.with_suffix(".jsonl.new")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, self._path)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1, write_to_disk=True)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line: `{"kind": kind, "step": step, **values}`; lists become one TensorBoard scalar for each loop."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, list):
                for loop, part in enumerate(value, start=1):
                    self._events.add_scalar(f"{kind}/{name}/{loop}", part, step)
            elif isinstance(value, int | float):
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._file.close()
        self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without a last one that a killed process left incomplete; none if there is no file.

    Raises:
      UserError: a line that is not JSON before the last.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was never finished
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}:{number}: not JSON; remove the line") from None
    return rows


def as_values(metrics: StepMetrics) -> dict[str, Any]:
    """The metrics of a step as plain numbers and lists; fetches them from the device."""
    host = jax.device_get(metrics)
    return {
        "loss": float(host.loss),
        "expected_loss": float(host.exits.expected_loss),
        "loss_per_loop": _floats(host.exits.loss_per_loop),
        "exit_pdf": _floats(host.exits.exit_pdf),
        "mean_exit_loop": float(host.exits.mean_exit_loop),
        "exit_entropy": float(host.exits.exit_entropy),
        "gradient_norm": float(host.gradient_norm),
        "learning_rate": float(host.learning_rate),
        "tokens": int(host.tokens),
        "skipped": int(host.skipped),
    }


def _floats(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
