"""Published peak performance of accelerators, and the names of the topologies that they make up.

The figures are the reference for step times and model FLOPs utilization.
"""

import dataclasses
from collections.abc import Sequence

import jax

_GIB = 2**30
_GB = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as JAX counts devices.

    The figures of a chip with two cores that JAX counts as two devices are halved. Rates are dense and per second.

    Attributes:
      name: the name of the accelerator in this package.
      device_kinds: the values of `jax.Device.device_kind` for it.
      peak_bf16_flops: bfloat16 operations per second.
      hbm_bytes: the size of its memory.
      hbm_bandwidth: bytes of memory traffic per second.
      ici_bandwidth: bytes per second sent in one direction over all links to other chips of a slice or a node. Vendors
        publish the sum of both directions, hence the halves below.
      network_bandwidth: bytes per second sent beyond the slice or node; None if not published.
      torus_dimensions: dimensions of the torus of links; 0 if each chip is connected to every other.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    network_bandwidth: float | None = None
    torus_dimensions: int = 0


CHIPS = (
    # https://cloud.google.com/tpu/docs/v4: 275 TFLOP/s, 32 GiB, 1200 GB/s. Links: 6 of 50 GB/s, arXiv 2304.01433.
    Chip(
        name="v4",
        device_kinds=("TPU v4",),
        peak_bf16_flops=275e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1200 * _GB,
        ici_bandwidth=300 * _GB,
        torus_dimensions=3,
    ),
    # https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 16 GB, 819 GB/s, links 400 GB/s, 6.4 Tb/s beyond a pod of
    # 256 chips.
    Chip(
        name="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e", "TPU v5litepod"),
        peak_bf16_flops=197e12,
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=819 * _GB,
        ici_bandwidth=400 * _GB / 2,
        network_bandwidth=6400 * _GB / 8 / 256,
        torus_dimensions=2,
    ),
    # https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 95 GiB, 2765 GB/s, links 1200 GB/s, 50 Gb/s beyond.
    Chip(
        name="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        peak_bf16_flops=459e12,
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765 * _GB,
        ici_bandwidth=1200 * _GB / 2,
        network_bandwidth=50 * _GB / 8,
        torus_dimensions=3,
    ),
    # https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 32 GB, 1638 GB/s, links 800 GB/s; 100 Gb/s beyond, by
    # https://docs.cloud.google.com/tpu/docs/tpu7x.
    Chip(
        name="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        peak_bf16_flops=918e12,
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1638 * _GB,
        ici_bandwidth=800 * _GB / 2,
        network_bandwidth=100 * _GB / 8,
        torus_dimensions=2,
    ),
    # https://docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s, 192 GiB, 7380 GB/s, links 1200 GB/s, 100 Gb/s beyond,
    # each of a chip of two devices.
    Chip(
        name="tpu7x",
        device_kinds=("TPU7x", "TPU v7x"),
        peak_bf16_flops=2307e12 / 2,
        hbm_bytes=192 * _GIB // 2,
        hbm_bandwidth=7380 * _GB / 2,
        ici_bandwidth=1200 * _GB / 2 / 2,
        network_bandwidth=100 * _GB / 8 / 2,
        torus_dimensions=3,
    ),
    # https://www.nvidia.com/en-us/data-center/a100: 312 TFLOP/s, 1555 and 2039 GB/s, NVLink 600 GB/s.
    Chip(
        name="a100-40gb",
        device_kinds=("NVIDIA A100-SXM4-40GB",),
        peak_bf16_flops=312e12,
        hbm_bytes=40 * _GB,
        hbm_bandwidth=1555 * _GB,
        ici_bandwidth=600 * _GB / 2,
    ),
    Chip(
        name="a100-80gb",
        device_kinds=("NVIDIA A100-SXM4-80GB",),
        peak_bf16_flops=312e12,
        hbm_bytes=80 * _GB,
        hbm_bandwidth=2039 * _GB,
        ici_bandwidth=600 * _GB / 2,
    ),
    # https://www.nvidia.com/en-us/data-center/h100: 989 TFLOP/s without sparsity, 80 GB, 3.35 TB/s, NVLink 900 GB/s.
    Chip(
        name="h100",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        peak_bf16_flops=989e12,
        hbm_bytes=80 * _GB,
        hbm_bandwidth=3350 * _GB,
        ici_bandwidth=900 * _GB / 2,
    ),
    # https://www.nvidia.com/en-us/data-center/h200: as the H100, with 141 GB and 4.8 TB/s.
    Chip(
        name="h200",
        device_kinds=("NVIDIA H200",),
        peak_bf16_flops=989e12,
        hbm_bytes=141 * _GB,
        hbm_bandwidth=4800 * _GB,
        ici_bandwidth=900 * _GB / 2,
    ),
)
"""The known chips, with the figures of their makers."""


def known_chip(device_kind: str) -> Chip | None:
    """Returns the chip with this `device_kind`, or None if it is unknown."""
    return next((chip for chip in CHIPS if device_kind in chip.device_kinds), None)


def topology_name(devices: Sequence[jax.Device]) -> str:
    """Returns the name of the topology that all of `devices` make up, as `looplm plan --topology` takes it.

    Several slices have their number before it: `2 x v5e:16x16`.
    """
    first = devices[0]
    chip = known_chip(first.device_kind)
    family = first.platform if chip is None else chip.name
    if chip is None or chip.torus_dimensions == 0:
        return f"{family}:{len(devices)}"
    slices = {getattr(device, "slice_index", 0) for device in devices}
    # Every slice has the same shape.
    places = [device.coords for device in devices if getattr(device, "slice_index", 0) == min(slices)]
    sizes = [max(along) - min(along) + 1 for along in zip(*places, strict=True)][: chip.torus_dimensions]
    name = f"{family}:{'x'.join(map(str, sizes))}"
    return name if len(slices) == 1 else f"{len(slices)} x {name}"
