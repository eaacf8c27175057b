"""The time that a run spends on each activity, and the utilization of the devices.

The time is divided among activities; the goodput is the fraction spent in train steps. Model FLOPs are computed by
formula, because XLA's cost analysis counts the body of a scan only once.
"""

import enum
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from looplm_jax.config import GatePlacement, Injection, ModelConfig, Objective, ReadOut
from looplm_jax.json_io import as_float
from looplm_jax.sharding._hardware import known_chip

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
    ROLLOUTS = "rollouts"
    EVALUATION = "evaluation"
    OTHER = "other"


_REMEDIES = {
    Activity.INPUT: "waiting for input: tokenize the data beforehand, or put it on a faster disk",
    Activity.SAVE: "saving: raise checkpoint.every, or save to a faster disk",
    Activity.COMPILE: "compiling: keep programs on a disk with JAX_COMPILATION_CACHE_DIR, or raise stage.min_loops",
}


class ActivityTimer:
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
        # Differences, so that the lines of a run add up to its time.
        new = {activity: self._seconds[activity] - self._read_out[activity] for activity in Activity}
        self._read_out = dict(self._seconds)
        return {f"{_PREFIX}{activity.value}": round(seconds, 3) for activity, seconds in new.items()}


def total_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[Activity, float]:
    """Returns the seconds of every activity, summed over the metrics of all processes that continued the run.

    Args:
      rows: the lines of `metrics.jsonl`.
    """

    # Lines of older versions lack some fields, which are then not a number.
    def total(name: str) -> float:
        return sum(filter(math.isfinite, (as_float(row.get(name)) for row in rows)))

    return {activity: total(f"{_PREFIX}{activity.value}") for activity in Activity}


def shares(seconds: Mapping[Activity, float]) -> dict[Activity, float]:
    """Returns the fraction of the time that each activity took, or an empty dictionary if no time has passed."""
    total = sum(seconds.values())
    return {activity: spent / total for activity, spent in seconds.items()} if total > 0 else {}


def time_summary(seconds: Mapping[Activity, float]) -> str:
    """Returns one line with the total time and the fraction of each activity of at least 0.05 %."""
    minutes, rest = divmod(round(sum(seconds.values())), 60)
    parts = [f"{activity.value} {share:.1%}" for activity, share in shares(seconds).items() if share >= 0.0005]
    return f"time {minutes}:{rest:02d}: {', '.join(parts)}"


def time_warnings(seconds: Mapping[Activity, float]) -> list[str]:
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


# Model FLOPs


def forward_flops_per_token(
    config: ModelConfig, *, loops: int | float, sequence_length: int, read_out: ReadOut = ReadOut.EVERY_LOOP
) -> int:
    """Returns the operations of one token's forward pass through all loops, including the head of each loop.

    Each multiply-add of a matrix product counts as two operations. Attention counts the causal half, `(S + 1) / 2` keys
    per query. Norms, rotary embedding, softmax and the embedding lookup are excluded, as is usual for model FLOP/s.

    Args:
      config: the model.
      loops: the number of loops, or its mean.
      sequence_length: the number of positions of a sequence.
      read_out: the loops after which coda, head and gate run.
    """
    inner, kv_inner = config.num_heads * config.head_width, config.kv_heads * config.head_width
    # Multiply-adds per token: query and output, keys and values; then the three matrices of the feed-forward layer.
    projections = config.width * (2 * inner + 2 * kv_inner) + 3 * config.width * config.mlp_width
    attention = inner * (sequence_length + 1)  # multiply-adds of scores and mixing, each over (S + 1) / 2 keys
    layer = 2 * projections + 2 * attention

    matrices = {Injection.LINEAR: 2, Injection.DIAGONAL: 1}.get(config.injection, 0)
    injection = 2 * matrices * config.width**2
    # The head and the exit gate.
    gate = 0 if config.gate is GatePlacement.NONE else 2 * config.width
    readout = 2 * config.width * config.vocab_size + gate

    per_readout = config.coda_layers * layer + readout
    per_loop = config.num_layers * layer + injection
    readouts = 1 if read_out is ReadOut.LAST else loops
    return round(config.prelude_layers * layer + loops * per_loop + readouts * per_readout)


def train_flops_per_token(
    config: ModelConfig,
    *,
    loops: int | float,
    sequence_length: int,
    objective: Objective = Objective.EXPECTED_LOSS,
    read_out: ReadOut = ReadOut.EVERY_LOOP,
    backprop_loops: int = 0,
    short_loops: float = 0,
    rollouts: int = 0,
) -> int:
    """Returns the operations of one token's train step.

    The backward pass costs twice the forward pass, or nothing if only the gate is trained. `last_loss` evaluates the
    head only after the last loop, and `ponder` coda and head only once. `looprpt` adds a forward pass of the teacher,
    and a forward and a backward pass of every rollout. Recomputation under rematerialization is not counted: these are
    operations of the model, not of the hardware. For the same reason the backward pass of a fixed point counts one
    loop, and not its solver.

    Args:
      config: the model.
      loops: the number of loops, or its mean.
      sequence_length: the number of positions of a sequence.
      objective: the objective of the stage.
      read_out: the loops after which coda, head and gate run.
      backprop_loops: the number of last loops with a backward pass; 0 for all.
      short_loops: the mean number of loops of the second pass of a shortcut; 0 without one.
      rollouts: the number of rollouts, G, of `looprpt`.
    """
    if read_out is ReadOut.LAST:
        forward, trained, short = (
            forward_flops_per_token(config, loops=count, sequence_length=sequence_length, read_out=read_out)
            for count in (loops, min(backprop_loops or loops, loops), short_loops)
        )
        return forward + 2 * trained + (3 * short if short_loops else 0)

    if objective is Objective.PONDER:
        read_out = ReadOut.LAST
    forward = forward_flops_per_token(config, loops=loops, sequence_length=sequence_length, read_out=read_out)
    if objective is Objective.GATE:
        return forward
    # Earlier loops have no head.
    if objective is Objective.LAST_LOSS:
        forward -= round((loops - 1) * 2 * config.width * config.vocab_size)
    if objective is Objective.LOOPRPT:
        return (1 + 3 + 3 * rollouts) * forward
    # One forward pass, and two products of its size for each matrix: the gradients of inputs and of weights.
    return 3 * forward


# Utilization


def peak_flops(mesh: Mesh) -> float | None:
    """Returns the bfloat16 peak of all devices of a mesh, in operations per second; None if one is unknown."""
    chips = [known_chip(device.device_kind) for device in mesh.devices.flat]
    # A utilization of a part of the devices would mean nothing.
    if any(chip is None for chip in chips):
        return None
    return sum(chip.peak_bf16_flops for chip in chips if chip is not None)


def model_flops_utilization(flops_per_second: float, peak: float | None) -> dict[str, float]:
    """Returns `{"mfu": model FLOP/s / peak FLOP/s}` (PaLM, arXiv 2204.02311, appendix B), or {} without a peak."""
    return {} if peak is None else {"mfu": flops_per_second / peak}


def memory_use() -> dict[str, int]:
    """Returns the peak memory of the fullest device of this process, in bytes, or {} if the backend does not report it.

    The peak is since the process started and includes all its programs.
    """
    # CPUs report no statistics.
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in counted if "peak_bytes_in_use" in stats]
    return {"device_memory_peak_bytes": max(peaks)} if peaks else {}
