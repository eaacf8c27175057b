"""Where the chips of TPUs lie in a mesh: within a slice they have links, between slices there is only the network."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from looplm_jax.errors import UserError

_BETWEEN_SLICES = 2  # axes of the mesh that may go from slice to slice: data, or else fsdp


def arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray | None:
    """Chips in a grid, neighbours along its axes close to each other; None where devices are no chips of TPUs.

    Of several slices the first axis that can goes from slice to slice.

    Raises:
      UserError: no axis is a multiple of the number of slices.
    """
    if devices[0].platform != "tpu":
        return None
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    axis = next((axis for axis in range(_BETWEEN_SLICES) if shape[axis] % slices == 0), None)
    if axis is None:
        raise UserError(f"neither mesh.data={shape[0]} nor mesh.fsdp={shape[1]} is a multiple of {slices} slices")
    outer = tuple(slices if at == axis else 1 for at in range(len(shape)))
    inner = tuple(size // many for size, many in zip(shape, outer, strict=True))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
