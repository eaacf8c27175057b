"""Utilization of the devices: model FLOPs utilization (MFU), and peak memory if the backend reports it."""

import jax
from jax.sharding import Mesh

from looplm_jax.sharding.chips import known_chip


def peak_flops(mesh: Mesh) -> float | None:
    """Returns the bfloat16 peak of all devices of a mesh, in operations per second; None if one is unknown."""
    chips = [known_chip(device.device_kind) for device in mesh.devices.flat]
    if any(chip is None for chip in chips):
        return None
    return sum(chip.peak_bf16_flops for chip in chips if chip is not None)


def model_flop_utilisation(flops_per_second: float, peak: float | None) -> dict[str, float]:
    """Returns `{"mfu": model FLOP/s / peak FLOP/s}` (PaLM, arXiv 2204.02311, appendix B), or {} without a peak."""
    return {} if peak is None else {"mfu": flops_per_second / peak}


def memory_use() -> dict[str, int]:
    """Returns the peak memory of the fullest device of this process, in bytes, or {} if the backend does not report it.

    The peak is since the process started and includes all its programs.
    """
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in counted if "peak_bytes_in_use" in stats]
    return {"device_memory_peak_bytes": max(peaks)} if peaks else {}
