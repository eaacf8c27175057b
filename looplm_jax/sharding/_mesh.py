"""The mesh of devices: its platform, the arrangement of its devices, and the models and batches that it fits.

The mesh may consist of devices that this machine does not have: a TPU program can be traced and compiled without a TPU.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from looplm_jax.config import MeshConfig, ModelConfig
from looplm_jax.errors import UserError

_BETWEEN_SLICES = 2  # only the first two mesh axes, data and fsdp, may cross slices


# Platforms


def target_platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`."""
    # The mesh in use decides, because its devices need not be those of this machine.
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.platform
    require_platform()
    return jax.default_backend()


def target_kind() -> str:
    """Returns the device kind, such as `TPU v5 lite`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.local_devices()[0].device_kind if device is None else device.device_kind


def first_device() -> list[jax.Device]:
    """Returns a list of only the first device of this process.

    Raises:
      UserError: its platform does not start.
    """
    require_platform()
    return jax.local_devices()[:1]


def require_platform() -> None:
    """Initializes the platform that programs run on.

    Raises:
      UserError: JAX_PLATFORMS names a platform that is not available or does not start.
    """
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:
        # JAX's own message may have several lines and repeats the remedy.
        named = jax.config.values["jax_platforms"]
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS=")[0]
        raise UserError(
            f"JAX cannot use the platform {named!r} here ({reason or 'it is not installed, or has no device'}); "
            "set JAX_PLATFORMS=cpu, which is always available, or unset it"
        ) from None


def require_compilation() -> None:
    """Checks that programs are compiled, as training, evaluation and the engine require.

    Raises:
      UserError: JAX_DISABLE_JIT is set.
    """
    if jax.config.values["jax_disable_jit"]:
        raise UserError("this command runs compiled programs; unset JAX_DISABLE_JIT")


# Meshes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that `config` describes.

    Args:
      config: the size of each axis. At most one may be -1, which takes the remaining devices.
      devices: the devices of the mesh; by default all.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    if devices is None:
        require_platform()
        devices = jax.devices()

    devices = list(devices)
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if -1 not in sizes.values() and fixed < len(devices) and jax.process_count() == 1:
        devices = devices[:fixed]  # a single process may use some of its devices only

    free = len(devices) // fixed
    shape = tuple(free if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices) or free < 1:
        wanted = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "data=1"
        raise UserError(
            f"a mesh of {wanted} does not fit {len(devices)} device(s); change mesh.* or set one axis to -1"
        )

    axis_types = (AxisType.Auto,) * len(shape)  # Flax Linen's logical constraints do not support Explicit axes

    grid = _arrange(shape, devices)
    if grid is not None:
        return Mesh(grid, tuple(sizes), axis_types=axis_types)

    return jax.make_mesh(shape, tuple(sizes), axis_types=axis_types, devices=devices)


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray | None:
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


# Checks


def check_divides(mesh: Mesh, model: ModelConfig) -> None:
    """Raises UserError if an axis of the model is not divisible by the mesh axes that shard it."""
    wanted = (
        (("fsdp", "context"), "width", model.width),
        (("tensor",), "num_heads", model.num_heads),
        (("tensor",), "num_kv_heads", model.kv_heads),
        (("tensor",), "mlp_width", model.mlp_width),
        (("tensor",), "vocab_size", model.vocab_size),
        # In attention, `context` shards heads in exchange for positions.
        (("tensor", "context"), "num_heads", model.num_heads),
    )

    for axes, name, size in wanted:
        used = [axis for axis in axes if mesh.shape[axis] > 1]
        shards = math.prod(mesh.shape[axis] for axis in used)
        if size % shards:
            product = " x ".join(f"mesh.{axis}" for axis in used)
            raise UserError(f"{product}={shards} does not divide model.{name}={size}; change one of them")


def check_batch(mesh: Mesh, batch_size: int, accumulation: int, where: str) -> None:
    """Raises UserError if the sequences of a microbatch are not divisible by the devices that shard them."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size // accumulation % shards:
        raise UserError(
            f"{where}.batch_size={batch_size} in {accumulation} microbatch(es) does not divide over "
            f"mesh.data x mesh.fsdp = {shards} devices; use a multiple of {shards * accumulation}"
        )


def check_sequence(mesh: Mesh, length: int, where: str) -> None:
    """Raises UserError if the length of a sequence is not divisible by the devices that shard it."""
    shards = mesh.shape["context"]
    if length % shards:
        raise UserError(
            f"{where}.sequence_length={length} does not divide over {shards} devices; "
            f"use a multiple of {shards}, or another {where}.context"
        )
