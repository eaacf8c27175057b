"""When weights are gathered, when gradients are summed, and what the backward pass recomputes do not change what is
learned.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from looplm_jax.config import ComputeConfig, Gather, MeshConfig, ModelConfig, Objective, Recipe, Reduce, Remat, Stage
from looplm_jax.data import Batch
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._state import initial_state

MODEL = ModelConfig(vocab_size=64, width=32, mlp_width=48, num_layers=2, num_heads=4, num_kv_heads=2)
STAGE = Stage(
    name="s", steps=1, batch_size=8, sequence_length=16, loops=3, accumulation=2, warmup_steps=0, learning_rate=1e-2
)
MESH = MeshConfig(data=2, fsdp=2, tensor=2)


def batch():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 64, (8, 17)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones((8, 16), np.int32),
        positions=np.tile(np.arange(16, dtype=np.int32), (8, 1)),
        loss_mask=(generator.random((8, 16)) < np.linspace(0, 1, 8)[:, None]).astype(np.float32),
    )


def step(stage=STAGE, model=MODEL, mesh=MESH, **compute):
    """Runs one step. Returns the loss, the gradient norm, Adam's mean of gradients, and the program."""
    recipe = Recipe(name="r", model=model, stages=(stage,), compute=ComputeConfig(loss_chunk=16, **compute))
    mesh, network = make_mesh(mesh), LoopLM(model, recipe.compute)
    programs = StagePrograms(recipe, network, stage, mesh, first_step=0)
    programs.compile(stage.loops)
    state, metrics = programs.run(
        stage.loops, initial_state(recipe, network, stage, mesh), to_device(batch(), stage, mesh)
    )
    return float(metrics.loss), float(metrics.gradient_norm), state.optimizer[1].mu, programs.text(stage.loops)


@pytest.fixture(scope="module")
def plain():
    return step()


@pytest.fixture(scope="module")
def gathered():
    return step(gather=Gather.PER_STEP)


def assert_same(found, wanted):
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    for (path, leaf), other in zip(jax.tree.leaves_with_path(found[2]), jax.tree.leaves(wanted[2]), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-7, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_the_same_gradients(plain, gathered):
    assert_same(gathered, plain)


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [Reduce.MICROBATCH, Reduce.STEP])
def test_the_same_gradients_when_they_are_summed_after_the_loops(plain, reduce):
    """Devices and microbatches have different numbers of targets; some have none."""
    found = step(gather=Gather.PER_STEP, reduce=reduce)
    assert_same(found, plain)
    kernel = found[2]["core"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "mesh"),
    [
        # Steps from answers have batches of their own, in tests/rl.
        *((objective, MeshConfig(data=8)) for objective in Objective if objective is not Objective.POLICY_GRADIENT),
        (Objective.EXPECTED_LOSS, MeshConfig(data=1, fsdp=2, tensor=2, context=2)),
    ],
    ids=str,
)
def test_every_objective_when_gradients_are_summed_once_a_step(mesh, objective):
    found = step(*small_case(objective), mesh, gather=Gather.PER_STEP, reduce=Reduce.STEP)
    assert_same(found, step_on_one_device(objective))


def small_case(objective):
    """Returns a stage and a model."""
    model = dataclasses.replace(MODEL, num_layers=1, prelude_layers=1, coda_layers=1, tied_head=True)
    return dataclasses.replace(STAGE, objective=objective, accumulation=1), model


@functools.cache
def step_on_one_device(objective):
    return step(*small_case(objective), MeshConfig(data=1))


@pytest.mark.slow
def test_gradients_stay_spread_as_the_parameters_are(gathered):
    kernel = gathered[2]["core"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compute",
    [
        {"gather": Gather.PER_STEP, "remat": Remat.NONE},
        {"remat": Remat.OFFLOAD},
        {"gather": Gather.PER_STEP, "reduce": Reduce.STEP, "remat": Remat.SAVE_OUTPUTS},
        {"remat": Remat.SAVE_QKV},
        {"remat": Remat.DOTS},
    ],
    ids=["gathered, nothing recomputed", "offloaded", "outputs saved", "queries, keys and values saved", "dots saved"],
)
def test_the_same_gradients_with_every_way_to_keep_activations(plain, compute):
    assert_same(step(**compute), plain)


@pytest.mark.slow
def test_prelude_and_coda_are_gathered_too():
    model = dataclasses.replace(MODEL, num_layers=1, prelude_layers=1, coda_layers=1)
    assert_same(step(model=model, gather=Gather.PER_STEP), step(model=model))


@pytest.mark.slow
def test_the_gate_alone_learns_from_gathered_weights():
    stage = dataclasses.replace(STAGE, objective=Objective.GATE, accumulation=1)
    losses = [step(stage, gather=gather)[0] for gather in Gather]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
