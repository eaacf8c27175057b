"""Measurements that benchmarks share: the bandwidth and speed of the device, and the peak memory of the process."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from looplm_jax.config import Dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The measured limits of a device: bytes read per second, and floating-point operations per second."""

    bandwidth: float
    flops: float


def measure_ceiling(dtype: Dtype) -> Ceiling:
    """Measures the bandwidth of a sum over 1 GiB, and the speed of a product of two square matrices."""
    size = 2**30 // jnp.dtype(dtype.value).itemsize

    # A CPU would take minutes for the larger matrices.
    long, side = jnp.ones(size, dtype.value), 4096 if jax.default_backend() == "cpu" else 16384
    square = jnp.ones((side, side), dtype.value)

    total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    product = jax.jit(lambda x: x @ x)

    read = _best_of(lambda: total(long).block_until_ready())
    return Ceiling(bandwidth=2**30 / read, flops=2 * side**3 / _best_of(lambda: product(square).block_until_ready()))


def peak_memory() -> int:
    """Returns the most bytes that were resident in this process.

    It reads /proc, because `getrusage` counts what the parent process held when it started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _best_of(run: Callable[[], object], times: int = 5) -> float:
    """Returns the shortest of several times, after a first run that compiles."""
    run()
    return min(_seconds(run) for _ in range(times))


def _seconds(run: Callable[[], object]) -> float:
    """Returns the seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
