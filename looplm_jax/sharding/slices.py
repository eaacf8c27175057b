"""Arranges TPU chips in a mesh. Chips of a slice are connected by links, slices only by the network."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from looplm_jax.errors import UserError

_BETWEEN_SLICES = 2  # only the first two mesh axes, data and fsdp, may cross slices


def arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray | None:
    """Returns the chips as a grid in which neighbors along an axis are close, or None if the devices are not TPUs.

    With several slices, the first axis of data and fsdp that is a multiple of their number crosses them.

    Raises:
      UserError: neither axis is a multiple of the number of slices.
    """
    if devices[0].platform != "tpu":
        return None

    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)

    axis = next((axis for axis in range(_BETWEEN_SLICES) if shape[axis] % slices == 0), None)
    if axis is None:
        raise UserError(f"neither mesh.data={shape[0]} nor mesh.fsdp={shape[1]} is a multiple of {slices} slices")

    # The numbers of slices, and of chips within a slice, along each axis.
    outer = tuple(slices if at == axis else 1 for at in range(len(shape)))
    inner = tuple(size // many for size, many in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
