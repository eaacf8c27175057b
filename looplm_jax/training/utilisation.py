"""How well the devices are used: model FLOP utilisation, and memory where the backend tells."""

import jax
from jax.sharding import Mesh

from looplm_jax.sharding.chips import known_chip


def peak_flops(mesh: Mesh) -> float | None:
    """What all devices of a mesh could do in bfloat16, operations a second; None where one of them is not known."""
    chips = [known_chip(device.device_kind) for device in mesh.devices.flat]
    if any(chip is None for chip in chips):
        return None
    return sum(chip.peak_bf16_flops for chip in chips if chip is not None)


def model_flop_utilisation(flops_per_second: float, peak: float | None) -> dict[str, float]:
    """`{"mfu": model FLOP/s over peak FLOP/s}` (PaLM, 2204.02311, appendix B), or nothing where no peak is known."""
    return {} if peak is None else {"mfu": flops_per_second / peak}


def memory_use() -> dict[str, int]:
    """The most bytes that one of this process's devices has held so far, or nothing where the backend does not count.

    That is since the process began, other programs of it included.
    """
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(stats["peak_bytes_in_use"]) for stats in counted if "peak_bytes_in_use" in stats]
    return {"device_memory_peak_bytes": max(peaks)} if peaks else {}
