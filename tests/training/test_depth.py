"""The number of loops of a step: how it is drawn, grows and is refused; and runs in which it changes."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from training_cases import RECIPE, STAGE, assert_identical, one_stage, random_batch

from looplm_jax.checkpoints._raw import read_raw
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import DepthConfig, DepthKind, DepthPer, MeshConfig, Objective, ReadOut, Schedule, Stage
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training import _compile as program
from looplm_jax.training import forward_flops_per_token, read_metrics, train, train_flops_per_token
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._depth import draw_depths, grows
from looplm_jax.training._state import initial_state

KEY = np.array([0, 7], np.uint32)
STEADY = dataclasses.replace(STAGE, min_loops=0, warmup_steps=0, schedule=Schedule.CONSTANT)
LAST = dataclasses.replace(STEADY, objective=Objective.LAST_LOSS, read_out=ReadOut.LAST)


def with_depth(stage=LAST, loops=8, **depth):
    changes = {name: depth.pop(name) for name in ("backprop_loops", "steps") if name in depth}
    return dataclasses.replace(stage, loops=loops, depth=DepthConfig(**depth), **changes)


# Draws.


def drawn(count=20_000, **depth):
    stage = dataclasses.replace(
        with_depth(loops=1000, per=DepthPer.SEQUENCE, **depth), batch_size=count, accumulation=1
    )
    return draw_depths(stage, KEY, 3, 0)


@pytest.mark.parametrize(
    ("kind", "mean", "deviation"),
    [
        (DepthKind.POISSON, 8.0, 7.0**0.5),
        # The published sampler of Huginn: 33.15 and 18.09 over as many draws.
        (DepthKind.POISSON_LOG_NORMAL, 33.0, 17.97),
        (DepthKind.LOG_NORMAL, 20.0, 20 * (np.exp(0.25) - 1) ** 0.5),
    ],
)
def test_draws_have_the_mean_and_the_deviation_of_their_distribution(kind, mean, deviation):
    values = drawn(kind=kind, mean=mean)
    assert values.dtype == np.int32
    assert values.min() >= 1
    assert values.mean() == pytest.approx(mean, rel=0.02)
    assert values.std() == pytest.approx(deviation, rel=0.03)


def test_draws_stay_within_the_limits_and_reach_them():
    values = drawn(kind=DepthKind.POISSON, mean=8.0, min=6, max=9)
    assert set(values) == {6, 7, 8, 9}
    assert set(drawn(kind=DepthKind.UNIFORM, min=2, max=4)) == {2, 3, 4}


def test_draws_follow_from_key_and_step_and_are_shared_by_the_sequences_of_a_step():
    stage = with_depth(kind=DepthKind.POISSON)
    assert [draw_depths(stage, KEY, step, 0)[0] for step in range(50)] == [
        draw_depths(stage, KEY, step, 0)[0] for step in range(50)
    ]
    assert all(len(set(draw_depths(stage, KEY, step, 0))) == 1 for step in range(9))
    assert len({draw_depths(stage, KEY, step, 0)[0] for step in range(50)}) > 3


def test_the_older_field_draws_the_same_as_uniform():
    older = dataclasses.replace(STEADY, loops=8, min_loops=3)
    newer = with_depth(stage=STEADY, kind=DepthKind.UNIFORM, min=3)
    for step in range(20):
        assert_identical(draw_depths(older, KEY, step, 0), draw_depths(newer, KEY, step, 0))
    assert from_dict(Stage, to_dict(older)) == older


def test_a_growing_depth_adds_a_loop_every_few_steps_of_the_stage():
    stage = with_depth(kind=DepthKind.GROWING, loops=4, min=2, every=3)
    depths = [int(draw_depths(stage, KEY, step, 100)[0]) for step in range(100, 112)]
    assert depths == [2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4]
    assert [step for step in range(100, 112) if grows(stage, step, 100)] == [103, 106]


# Refusals.


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (LAST, {"objective": Objective.EXPECTED_LOSS}, "which objective=expected_loss needs; set objective=last_loss"),
        (STEADY, {"backprop_loops": 1}, "stages.pretrain.backprop_loops=1 needs stages.pretrain.read_out=last"),
        (LAST, {"backprop_loops": 3}, "backprop_loops must be in 0..2, the largest number of loops, not 3"),
        (LAST, {"min_loops": 1, "depth": DepthConfig(kind=DepthKind.POISSON)}, "both say how loops are drawn"),
        (LAST, {"depth": DepthConfig(kind=DepthKind.POISSON, min=3)}, "depth.min=3 is above its largest number of loo"),
        (
            STEADY,
            {"depth": DepthConfig(kind=DepthKind.UNIFORM, per=DepthPer.SEQUENCE)},
            "depth.per=sequence needs stages.pretrain.read_out=last",
        ),
    ],
)
def test_combinations_without_meaning_are_refused(stage, changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(stage, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_a_kind_does_not_read_is_refused():
    with pytest.raises(UserError, match=r"^depth.sigma=0.7 has no effect with depth.kind=uniform; leave it at 0.5, or"):
        DepthConfig(kind=DepthKind.UNIFORM, sigma=0.7)
    with pytest.raises(UserError, match=r"^depth.per=sequence has no effect with depth.kind=fixed; leave it at step"):
        DepthConfig(per=DepthPer.SEQUENCE)


# Runs.


@pytest.fixture
def traces(monkeypatch):
    """Returns the list of the numbers of loops for which a step was traced."""
    found, make = [], program.make_train_step

    def counting(*args, **kwargs):
        step = make(*args, **kwargs)
        return lambda state, batch: (found.append(kwargs["loops"]), step(state, batch))[1]

    monkeypatch.setattr(program, "make_train_step", counting)
    program.compiled_step.cache_clear()
    yield found
    program.compiled_step.cache_clear()


def assert_resumes(recipe, folder, step):
    """Trains, repeats the run from an earlier checkpoint, and returns the lines of the metrics."""
    train(recipe, folder)
    wanted, rows = read_raw(folder).arrays, read_metrics(folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    train(recipe, folder)
    assert_identical(read_raw(folder).arrays, wanted)
    assert [row["loss"] for row in read_metrics(folder) if row["kind"] == "train"] == [
        row["loss"] for row in rows if row["kind"] == "train"
    ]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_a_run_with_drawn_depths_is_one_program_and_resumes_exactly(traces, tmp_path):
    stage = with_depth(loops=30, kind=DepthKind.POISSON_LOG_NORMAL, mean=5.0, backprop_loops=3)
    rows = assert_resumes(one_stage(stage), tmp_path / "run", 4)
    assert traces == [30]
    key = np.asarray(read_raw(tmp_path / "run").arrays["key"])
    depths = [int(draw_depths(stage, key, step, 0)[0]) for step in range(6)]
    assert [row["loops"] for row in rows] == depths
    assert len(set(depths)) > 2
    assert [row["mean_exit_loop"] for row in rows] == pytest.approx(depths)
    assert all(len(row["loss_per_loop"]) == 1 for row in rows)


@pytest.mark.slow
def test_a_growing_depth_compiles_each_depth_once_clears_the_guard_and_resumes_exactly(traces, tmp_path):
    stage = with_depth(stage=STEADY, loops=3, kind=DepthKind.GROWING, min=1, every=2)
    recipe = one_stage(stage, evaluation=RECIPE.evaluation)
    rows = assert_resumes(recipe, tmp_path / "run", 2)
    assert [row["loops"] for row in rows] == [1, 1, 2, 2, 3, 3]
    assert traces == [1, 2, 3]
    # The guard has seen the two steps since the last growth.
    assert int(read_raw(tmp_path / "run").arrays["guard.accepted"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("mesh_config", [MeshConfig(data=2), MeshConfig(data=1, fsdp=2, tensor=2)])
def test_steps_with_a_depth_for_each_sequence_are_the_same_on_any_mesh(mesh_config):
    """Two devices reduce their own gradients, with their own numbers of iterations; else the compiler decides."""
    stage = dataclasses.replace(
        with_depth(loops=4, kind=DepthKind.UNIFORM, per=DepthPer.SEQUENCE, backprop_loops=2), accumulation=2
    )

    def steps(mesh_config):
        recipe = one_stage(stage, mesh=mesh_config)
        mesh, model = make_mesh(mesh_config), LoopLM(recipe.model, recipe.compute)
        state, losses = initial_state(recipe, model, stage, mesh), []
        programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
        programs.compile(4)
        for step in range(2):
            depths = draw_depths(stage, KEY, step, 0)
            assert len(set(depths)) > 1
            state, metrics = programs.run(4, state, to_device(random_batch(step), stage, mesh, depths))
            losses.append(float(metrics.loss))
        return losses, jax.device_get(state.params)

    losses, params = steps(MeshConfig(data=1))
    others, sharded = steps(mesh_config)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for leaf, wanted in zip(jax.tree.leaves(sharded), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=2e-4)


def test_operations_of_truncated_backpropagation():
    model = RECIPE.model

    def forward(loops):
        return forward_flops_per_token(model, loops=loops, sequence_length=16, read_out=ReadOut.LAST)

    def of_step(loops, backprop_loops):
        return train_flops_per_token(
            model, loops=loops, sequence_length=16, objective=Objective.LAST_LOSS, read_out=ReadOut.LAST,
            backprop_loops=backprop_loops,
        )  # fmt: skip

    assert of_step(8, 0) == of_step(8, 8) == 3 * forward(8)
    assert of_step(8, 3) == forward(8) + 2 * forward(3)
    assert of_step(2, 3) == 3 * forward(2)
