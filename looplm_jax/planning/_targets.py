"""The devices to plan for: slices of TPUs that need not be attached, or the attached devices."""

import dataclasses
import importlib.util
import math
import re

import jax
from jax.experimental import topologies

from looplm_jax.errors import UserError
from looplm_jax.planning._compiler import without_network
from looplm_jax.sharding._hardware import Chip, known_chip
from looplm_jax.sharding._mesh import require_platform

HERE = "here"
"""The topology of the attached devices."""

_EXAMPLES = {"v4": "v4:4x4x4", "v5e": "v5e:16x16", "v5p": "v5p:4x8x8", "v6e": "v6e:16x16", "tpu7x": "tpu7x:4x4x4"}
# The two cores of such a chip are one device to JAX.
_ONE_DEVICE_A_CHIP = {"v4": "megacore"}
_TOPOLOGY = re.compile(r"([a-z0-9]+):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices to compile for.

    Attributes:
      name: the name, for messages.
      devices: the devices of all slices.
      chip: the chip, or None if it is unknown.
      shape: the torus of one slice; empty if its links are not a torus.
      slices: the number of slices.
    """

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    shape: tuple[int, ...] = ()
    slices: int = 1

    @property
    def capacity(self) -> int | None:
        """The memory of a device in bytes, or None if it is not known."""
        if self.chip is not None:
            return self.chip.hbm_bytes

        # Slices are described by the compiler and not attached, so they have no statistics.
        statistics = None if self.shape else self.devices[0].memory_stats()
        return statistics.get("bytes_limit") if statistics else None

    @property
    def link_bandwidth(self) -> float | None:
        """The bytes per second that a device can send within its slice, or None if they are not known.

        In each dimension of the torus, a chip has two links if the dimension is closed to a ring, one if it is open,
        and none if it is one chip long.
        """
        if self.chip is None or not self.shape:
            return None if self.chip is None else self.chip.ici_bandwidth

        links = sum(_links(self.chip, size) for size in self.shape)
        return self.chip.ici_bandwidth * links / (2 * self.chip.torus_dimensions)


def find_target(topology: str, slices: int = 1) -> Target:
    """Returns the devices of a topology.

    Args:
      topology: such as `v5p:8x8x8`, or `here` for the attached devices.
      slices: the number of slices.

    Raises:
      UserError: there is no such topology, or the TPU compiler is not installed.
    """
    if slices < 1:
        raise UserError(f"--slices must be at least 1, not {slices}")

    if topology == HERE:
        require_platform()
        devices = tuple(jax.devices())
        return Target(
            name=f"{len(devices)} x {devices[0].device_kind}", devices=devices, chip=known_chip(devices[0].device_kind)
        )

    family, shape = _parse(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed; run `pip install 'looplm_jax[tpu]'`")

    devices = _slice_devices(topology, family, shape, slices)
    name = topology if slices == 1 else f"{slices} x {topology}"
    return Target(name=name, devices=devices, chip=known_chip(devices[0].device_kind), shape=shape, slices=slices)


def _parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """Returns the family and the shape of a topology. Raises UserError if there is none of that form."""
    found = _TOPOLOGY.fullmatch(topology)
    if found is None or found[1] not in _EXAMPLES:
        examples = ", ".join(_EXAMPLES.values())
        raise UserError(f"unknown topology {topology!r}; say {HERE}, or family:chips, such as {examples}")

    family, shape = found[1], tuple(map(int, found[2].split("x")))
    wanted = len(_EXAMPLES[family].partition(":")[2].split("x"))
    if len(shape) != wanted:
        raise UserError(f"a slice of {family} has {wanted} dimensions, unlike {topology}; such as {_EXAMPLES[family]}")
    # A pod of these chips has no links beyond 16x16.
    if wanted == 2 and math.prod(shape) > 256:
        raise UserError(f"a slice of {family} has at most 16x16 chips, unlike {topology}; use --slices for more")
    return family, shape


def _slice_devices(topology: str, family: str, shape: tuple[int, ...], slices: int) -> tuple[jax.Device, ...]:
    """Returns the devices of TPU slices, as the compiler describes them."""
    options: dict[str, object] = {}
    if family in _ONE_DEVICE_A_CHIP:
        options["chip_config_name"] = _ONE_DEVICE_A_CHIP[family]
    if slices > 1 or 1 in shape[:2]:  # a host with fewer chips than the compiler expects
        options["chips_per_host_bounds"] = (min(shape[0], 2), min(shape[1], 2), 1)
    if slices > 1:
        options["num_slices"] = slices

    try:
        with without_network():
            return tuple(topologies.get_topology_desc(topology, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].partition(": ")[2]
        raise UserError(f"there is no slice {topology}: {reason}; such as {_EXAMPLES[family]}") from None


def _links(chip: Chip, size: int) -> int:
    """Returns the links of a chip along one dimension.

    Dimensions of whole 4x4x4 cubes are closed to rings, as are those of 16x16 pods.
    """
    closed = size % 4 == 0 if chip.torus_dimensions == 3 else size == 16
    return 0 if size == 1 else 2 if closed else 1
