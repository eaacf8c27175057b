"""The same losses and parameters on every mesh, within float32 rounding."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from looplm_jax.config import (
    ComputeConfig,
    InitialState,
    Injection,
    MeshConfig,
    ModelConfig,
    Recipe,
    Remat,
    Stage,
    TimeSignal,
)
from looplm_jax.data import Batch
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import check_batch, check_divides, check_sequence, make_mesh
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._state import TrainState, abstract_state, initial_state

ONE = MeshConfig(data=1)
MESHES = {
    "8x1x1": MeshConfig(data=8),
    "2x4x1": MeshConfig(data=2, fsdp=4),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
    "2x1x1x4": MeshConfig(data=2, context=4),
    "1x2x2x2": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
}
MODEL = ModelConfig(vocab_size=64, width=32, mlp_width=48, num_layers=1, num_heads=4, num_kv_heads=2, max_positions=64)
COMPUTE = ComputeConfig(remat=Remat.NONE, loss_chunk=16)
STAGE = Stage(name="pretrain", steps=3, batch_size=16, sequence_length=16, loops=2, learning_rate=1e-2)
RECIPE = Recipe(name="mesh", model=MODEL, compute=COMPUTE, stages=(STAGE,))


def random_batch(rng: np.random.Generator, *, rows: int, length: int) -> Batch:
    """Returns packed rows of two documents, the second of random length, with some masked positions."""
    tokens = rng.integers(0, 64, (rows, length + 1)).astype(np.int32)
    cut = rng.integers(4, length - 4, (rows, 1))
    columns = np.arange(length)[None]
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=(1 + (columns >= cut)).astype(np.int32),
        positions=np.where(columns < cut, columns, columns - cut).astype(np.int32),
        loss_mask=(rng.random((rows, length)) < 0.9).astype(np.float32),
    )


@functools.cache
def initial(mesh_config: MeshConfig, config: ModelConfig = MODEL) -> TrainState:
    recipe = dataclasses.replace(RECIPE, model=config)
    return jax.device_get(initial_state(recipe, LoopLM(config, COMPUTE), STAGE, make_mesh(mesh_config)))


@functools.cache
def run(mesh_config: MeshConfig, accumulation: int, config: ModelConfig = MODEL):
    """Returns the losses and the last state of three steps."""
    mesh, model = make_mesh(mesh_config), LoopLM(config, COMPUTE)
    stage = dataclasses.replace(STAGE, accumulation=accumulation)
    recipe = dataclasses.replace(RECIPE, model=config, stages=(stage,))
    wanted = abstract_state(recipe, model, stage, mesh)
    state = jax.device_put(initial(ONE, config), jax.tree.map(lambda leaf: leaf.sharding, wanted))
    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
    programs.compile(stage.loops)
    losses = []
    for seed in range(stage.steps):
        batch = random_batch(np.random.default_rng(seed), rows=stage.batch_size, length=stage.sequence_length)
        state, metrics = programs.run(stage.loops, state, to_device(batch, stage, mesh))
        losses.append(float(metrics.loss))
    return losses, state


@pytest.mark.parametrize(
    "name", [name if name == "1x2x2x2" else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]
)
def test_same_losses_and_parameters_on_every_mesh(name, capfd):
    """Accumulates two microbatches on the mesh, and uses one on the single device."""
    reference_losses, reference = run(ONE, accumulation=1)
    losses, state = run(MESHES[name], accumulation=2)
    # XLA warns about arrays that it can only reshard by a full gather, as it once did about the embedded tokens.
    assert "full rematerialization" not in capfd.readouterr().err
    np.testing.assert_allclose(losses, reference_losses, rtol=1e-5)
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(state.params), jax.tree.leaves(reference.params), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, atol=2e-4, err_msg=jax.tree_util.keystr(path))


# Where gradients are reduced by the compiler, and in a local region of each device.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["1x2x2x2", "8x1x1"])
def test_states_start_from_the_same_noise_on_every_mesh(name):
    config = dataclasses.replace(
        MODEL,
        injection=Injection.DIAGONAL,
        initial_state=InitialState.NOISE,
        time_signal=TimeSignal.LEARNED,
        qk_bias=True,
    )
    reference, _ = run(ONE, 1, config)
    losses, _ = run(MESHES[name], 2, config)
    np.testing.assert_allclose(losses, reference, rtol=1e-5)


@pytest.mark.slow
def test_a_run_begins_with_the_same_parameters_on_every_mesh():
    sharded = initial(MESHES["2x2x2"])
    for leaf, wanted in zip(jax.tree.leaves(sharded), jax.tree.leaves(initial(ONE)), strict=True):
        np.testing.assert_array_equal(leaf, wanted)


def test_the_parameters_are_really_spread():
    _, state = run(MESHES["2x2x2"], accumulation=2)
    for tree in (state.params, state.optimizer[1].mu):
        kernel = tree["core"]["layers"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 24)
        assert tree["embedding"].sharding.shard_shape(tree["embedding"].shape) == (32, 16)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=16), "a mesh of data=16 does not fit 8 device"),
        (MeshConfig(data=-1, fsdp=3), "fsdp=3"),
        (MeshConfig(data=-1, tensor=16), "does not fit 8 device"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        make_mesh(mesh)


def test_a_model_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with pytest.raises(UserError, match=r"mesh.tensor=4 does not divide model.num_kv_heads=2; change one of them"):
        check_divides(mesh, MODEL)


def test_heads_that_devices_of_a_sequence_cannot_share_are_refused():
    mesh = make_mesh(MeshConfig(data=1, context=8))
    with pytest.raises(UserError, match=r"mesh.context=8 does not divide model.num_heads=4; change one of them"):
        check_divides(mesh, MODEL)


def test_a_sequence_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    message = (
        r"stages.x.sequence_length=18 does not divide over 4 devices; use a multiple of 4, or another stages.x.cont"
    )
    with pytest.raises(UserError, match=message):
        check_sequence(mesh, 18, "stages.x")


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(
        UserError, match=r"stages.x.batch_size=12 in 1 microbatch\(es\) does not divide .* use a multiple of 8"
    ):
        check_batch(mesh, 12, 1, "stages.x")
