"""Programs compiled by the TPU compiler, for chips that need not be attached."""

import dataclasses
import os
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from looplm_jax.config import MeshConfig, ModelConfig, Recipe, Stage
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh, use_mesh
from looplm_jax.training._compile import abstract_batch
from looplm_jax.training._state import abstract_state
from looplm_jax.training._step import make_train_step

MODEL = ModelConfig(vocab_size=512, width=256, mlp_width=256, num_layers=2, num_heads=8, head_dim=128, loops=2)
STAGE = Stage(name="s", steps=2, batch_size=4, sequence_length=256, loops=2)
# With these settings the compiler queries no metadata server and lets other processes compile at the same time.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def tpu_mesh(topology: str, config: MeshConfig, devices: int | None = None) -> Mesh:
    """Returns a mesh over a slice such as `v5e:2x2`, or its first `devices`; skips the test without a TPU compiler."""
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
    os.environ.update(_ALONE)
    whole = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return make_mesh(config, whole.devices[:devices])


def lowered_step(mesh: Mesh, *, model: ModelConfig = MODEL, **changes: Any) -> Any:
    """Returns the train step of a stage, lowered for a mesh of TPUs."""
    stage, network = dataclasses.replace(STAGE, **changes), LoopLM(model)
    recipe = Recipe(name="r", model=model, stages=(stage,))
    state = abstract_state(recipe, network, stage, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = make_train_step(recipe, network, stage, first_step=0, loops=stage.loops)
    with use_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere))
        traced = jitted.trace(state, abstract_batch(stage, mesh))
        return traced.lower(lowering_platforms=("tpu",))
