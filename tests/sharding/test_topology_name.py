"""What devices are called together, those that are here and those of slices that are not."""

from unittest.mock import Mock

import jax
import pytest

from looplm_jax.planning._targets import find_target
from looplm_jax.sharding import topology_name


def devices(count, kind, platform):
    return count * [Mock(spec=jax.Device, device_kind=kind, platform=platform)]


@pytest.mark.parametrize(
    ("devices", "name"),
    [(devices(4, "NVIDIA H200", "gpu"), "h200:4"), (devices(2, "NVIDIA L4", "gpu"), "gpu:2")],
    ids=["known", "unknown"],
)
def test_devices_whose_links_are_no_torus(devices, name):
    assert topology_name(devices) == name


def test_the_name_of_the_devices_that_are_here():
    assert topology_name(jax.devices()) == f"cpu:{jax.device_count()}"


@pytest.mark.parametrize(
    ("topology", "slices"),
    [("v5e:16x16", 1), ("v5e:1x1", 1), ("v6e:4x8", 1), ("v5p:2x2x4", 1), ("tpu7x:2x2x1", 1), ("v5e:2x2", 2)],
)
def test_a_slice_is_called_as_the_plan_calls_it(topology, slices):
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
    target = find_target(topology, slices)
    assert topology_name(target.devices) == target.name
