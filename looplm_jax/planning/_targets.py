"""What a plan is made for: a slice of TPUs that need not be here, or the devices that are."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from looplm_jax.errors import UserError
from looplm_jax.sharding._hardware import Chip, known_chip
from looplm_jax.sharding._mesh import require_platform

HERE = "here"
_EXAMPLES = {"v4": "v4:4x4x4", "v5e": "v5e:16x16", "v5p": "v5p:4x8x8", "v6e": "v6e:16x16", "tpu7x": "tpu7x:4x4x4"}
_ONE_DEVICE_A_CHIP = {"v4": "megacore"}
_TOPOLOGY = re.compile(r"([a-z0-9]+):(\d+(?:x\d+)*)")
# The compiler asks no metadata server, takes this for a host of some kind (which changes no program), and lets other
# processes load it at the same time.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for. `shape` is the torus of one slice, empty where the links are not one."""

    name: str
    devices: tuple[jax.Device, ...]
    chip: Chip | None
    shape: tuple[int, ...] = ()
    slices: int = 1

    @property
    def capacity(self) -> int | None:
        """Bytes of memory of a device, where someone knows them."""
        if self.chip is not None:
            return self.chip.hbm_bytes
        statistics = None if self.shape else self.devices[0].memory_stats()
        return statistics.get("bytes_limit") if statistics else None

    @property
    def link_bandwidth(self) -> float | None:
        """Bytes a second that a device can send to others of its slice, over the links that the slice has.

        A dimension of the torus gives two links to each chip if it is closed to a ring, one if it is open, none if it
        is one chip long.
        """
        if self.chip is None or not self.shape:
            return None if self.chip is None else self.chip.ici_bandwidth
        links = sum(_links(self.chip, size) for size in self.shape)
        return self.chip.ici_bandwidth * links / (2 * self.chip.torus_dimensions)


def find_target(topology: str, slices: int = 1) -> Target:
    """The devices of `topology`, such as `v5p:8x8x8`, or those attached for `here`.

    Raises:
      UserError: no such topology, or no TPU compiler installed.
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


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """While the block runs, the TPU compiler looks for nothing outside this machine."""
    before = {name: os.environ.get(name) for name in _ALONE}
    os.environ.update({name: value for name, value in _ALONE.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _parse(topology: str) -> tuple[str, tuple[int, ...]]:
    found = _TOPOLOGY.fullmatch(topology)
    if found is None or found[1] not in _EXAMPLES:
        examples = ", ".join(_EXAMPLES.values())
        raise UserError(f"unknown topology {topology!r}; say {HERE}, or family:chips, such as {examples}")
    family, shape = found[1], tuple(map(int, found[2].split("x")))
    wanted = len(_EXAMPLES[family].partition(":")[2].split("x"))
    if len(shape) != wanted:
        raise UserError(f"a slice of {family} has {wanted} dimensions, unlike {topology}; such as {_EXAMPLES[family]}")
    if wanted == 2 and math.prod(shape) > 256:
        raise UserError(f"a slice of {family} has at most 16x16 chips, unlike {topology}; use --slices for more")
    return family, shape


def _slice_devices(topology: str, family: str, shape: tuple[int, ...], slices: int) -> tuple[jax.Device, ...]:
    options: dict[str, object] = {}
    if family in _ONE_DEVICE_A_CHIP:
        options["chip_config_name"] = _ONE_DEVICE_A_CHIP[family]
    if slices > 1 or 1 in shape[:2]:  # a host of fewer chips than the compiler expects has to be named
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
    """Links of a chip along a dimension: slices of whole cubes of 4x4x4 are closed to rings, as are pods of 16x16."""
    closed = size % 4 == 0 if chip.torus_dimensions == 3 else size == 16
    return 0 if size == 1 else 2 if closed else 1
