"""One program on every mesh: the same losses and parameters within float32 rounding."""

import dataclasses

import jax
import numpy as np
import pytest

from looplm_jax.config import MeshConfig, ModelConfig, Recipe, Stage
from looplm_jax.data.packing import Batch
from looplm_jax.errors import UserError
from looplm_jax.models.looplm import LoopLM
from looplm_jax.sharding import check_batch, check_divides, make_mesh
from looplm_jax.training.program import StagePrograms, place
from looplm_jax.training.state import initial_state

ONE = MeshConfig(data=1)
MESHES = {
    "8x1x1": MeshConfig(data=8),
    "2x4x1": MeshConfig(data=2, fsdp=4),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}
STEPS = 3


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    model = ModelConfig(
        vocab_size=64, width=32, mlp_width=48, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64
    )
    stage = Stage(
        name="pretrain", steps=STEPS, batch_size=16, accumulation=2, sequence_length=16, loops=3, learning_rate=1e-2
    )
    return Recipe(name="mesh", model=model, stages=(stage,))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    return [random_batch(np.random.default_rng(seed), rows=16, length=16) for seed in range(STEPS)]


def random_batch(rng: np.random.Generator, *, rows: int, length: int) -> Batch:
    """Packed rows of two documents, the second of random length, with some masked positions."""
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


def run(recipe: Recipe, mesh_config: MeshConfig, batches: list[Batch]):
    mesh = make_mesh(mesh_config)
    model, stage = LoopLM(recipe.model, recipe.compute), recipe.stages[0]
    state = initial_state(recipe, model, stage, mesh)
    programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
    programs.compile(stage.loops)
    losses = []
    for batch in batches:
        state, metrics = programs.run(stage.loops, state, place(batch, stage, mesh))
        losses.append(float(metrics.loss))
    return losses, state


@pytest.fixture(scope="module")
def unsharded(recipe: Recipe, batches: list[Batch]):
    return run(recipe, ONE, batches)


@pytest.mark.parametrize("name", MESHES)
def test_same_losses_and_parameters_on_every_mesh(name, recipe, batches, unsharded):
    losses, state = run(recipe, MESHES[name], batches)
    np.testing.assert_allclose(losses, unsharded[0], rtol=1e-5)
    ours, theirs = jax.tree.leaves_with_path(state.params), jax.tree.leaves(unsharded[1].params)
    for (path, leaf), reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(leaf, reference, atol=2e-4, err_msg=jax.tree_util.keystr(path))


def test_the_parameters_are_really_spread(recipe, batches):
    _, state = run(recipe, MESHES["2x2x2"], batches[:1])
    kernel = state.params["core"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 24)
    mean = state.optimizer[1].mu["core"]["layers"]["mlp"]["up"]["kernel"]
    assert mean.sharding.shard_shape(mean.shape) == (2, 16, 24)


def test_accumulation_changes_nothing(recipe, batches, unsharded):
    stage = dataclasses.replace(recipe.stages[0], accumulation=1)
    losses, state = run(dataclasses.replace(recipe, stages=(stage,)), ONE, batches)
    np.testing.assert_allclose(losses, unsharded[0], rtol=1e-5)
    for leaf, reference in zip(jax.tree.leaves(state.params), jax.tree.leaves(unsharded[1].params), strict=True):
        np.testing.assert_allclose(leaf, reference, atol=2e-4)


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


def test_a_model_that_does_not_divide_is_refused(recipe):
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    with pytest.raises(UserError, match=r"mesh.tensor=4 does not divide model.num_kv_heads=2; change one of them"):
        check_divides(mesh, recipe.model)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = make_mesh(MeshConfig(data=8))
    with pytest.raises(
        UserError, match=r"stages.x.batch_size=12 in 1 part\(s\) does not divide .* use a multiple of 8"
    ):
        check_batch(mesh, 12, 1, "stages.x")
