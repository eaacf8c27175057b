"""How fast a run trained, and where its time went."""

import statistics
from pathlib import Path

from looplm_jax.training.goodput import Activity, shares, total_seconds
from looplm_jax.training.metrics import TRAIN, read_metrics


def run_speed(folder: Path) -> dict[str, float]:
    """Of a finished run.

    Returns:
      tokens_per_second: the median over the lines of its metrics; share_in_steps: the part of its whole time, with
      compilation, saves and evaluation, that went to steps; share_waiting_for_input.
    """
    rows = [row for row in read_metrics(folder) if row["kind"] == TRAIN]
    time = shares(total_seconds(read_metrics(folder)))
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
        "share_in_steps": time[Activity.STEP],
        "share_waiting_for_input": time[Activity.INPUT],
    }
