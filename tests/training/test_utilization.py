import types

import jax
import numpy as np
import pytest

from looplm_jax.config import MeshConfig
from looplm_jax.sharding import make_mesh
from looplm_jax.sharding._hardware import CHIPS, known_chip
from looplm_jax.training._goodput import memory_use, model_flops_utilization, peak_flops


def test_no_two_chips_share_a_name():
    kinds = [kind for chip in CHIPS for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)


def test_a_device_that_is_not_known_has_no_peak():
    assert known_chip("cpu") is None
    assert peak_flops(make_mesh(MeshConfig(data=-1))) is None
    assert model_flops_utilization(1e12, None) == {}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_utilization_is_of_all_devices(chip, monkeypatch):
    """Four devices run at half of their peak."""
    device = types.SimpleNamespace(device_kind=chip.device_kinds[0])
    mesh = types.SimpleNamespace(devices=np.array([[device, device], [device, device]]))
    peak = peak_flops.__wrapped__(mesh) if hasattr(peak_flops, "__wrapped__") else peak_flops(mesh)
    assert model_flops_utilization(2 * chip.peak_bf16_flops, peak) == {"mfu": 0.5}


def test_memory_is_told_where_the_backend_counts(monkeypatch):
    assert memory_use() == {}
    counting = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (5, 9)]
    monkeypatch.setattr(jax, "local_devices", lambda: counting)
    assert memory_use() == {"device_memory_peak_bytes": 9}
