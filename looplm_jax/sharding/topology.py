"""What devices are called together: `v5e:16x16` for a slice of TPUs, `cpu:8` for devices whose links are no torus."""

from collections.abc import Sequence

import jax

from looplm_jax.sharding.chips import known_chip


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
