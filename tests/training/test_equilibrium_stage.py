"""Stages with a damped or implicit gradient and a Jacobian penalty: refusals, one program, the same on any mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import MODEL, STAGE, assert_identical, one_stage, random_batch

from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import (
    DepthConfig,
    DepthKind,
    Gradient,
    Injection,
    JacobianNorm,
    JacobianPenalty,
    MeshConfig,
    Objective,
    OptimizerConfig,
    ReadOut,
    Schedule,
    Solver,
    SolverKind,
    Stage,
    TimeSignal,
)
from looplm_jax.errors import UserError
from looplm_jax.models import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training import _compile as program
from looplm_jax.training._compile import StagePrograms, stage_mesh, to_device
from looplm_jax.training._draws import draw_step
from looplm_jax.training._metrics import as_values
from looplm_jax.training._notes import settings_without_effect
from looplm_jax.training._state import initial_state

DEQ = dataclasses.replace(MODEL, injection=Injection.ADD, injection_norm=True)
LAST = dataclasses.replace(
    STAGE,
    objective=Objective.LAST_LOSS,
    read_out=ReadOut.LAST,
    loops=40,
    min_loops=0,
    accumulation=2,
    schedule=Schedule.CONSTANT,
    warmup_steps=0,
)
IMPLICIT = dataclasses.replace(
    LAST, gradient=Gradient.IMPLICIT, solver=Solver(kind=SolverKind.BROYDEN, tolerance=1e-6, max_loops=30, memory=12)
)
ONE = MeshConfig(data=1)
PENALTY = JacobianPenalty(weight=3.0, kind=JacobianNorm.SPECTRAL, iterations=2)


# Refusals.


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            LAST,
            {"damping": 0.5},
            "damping=0.5 is that of the last loops with gradients; set stages.pretrain.backprop_lo",
        ),
        (LAST, {"damping": 1.5, "backprop_loops": 1}, "stages.pretrain.damping must be in (0, 1], not 1.5"),
        (IMPLICIT, {"read_out": ReadOut.EVERY_LOOP}, "gradient=implicit is that of one fixed point, not of every loop"),
        (IMPLICIT, {"backprop_loops": 2}, "gradient=implicit runs the loops of stages.pretrain.solver; set"),
        (IMPLICIT, {"depth": DepthConfig(kind=DepthKind.POISSON)}, "and stages.pretrain.depth.kind=fixed"),
        (
            LAST,
            {"read_out": ReadOut.EVERY_LOOP, "jacobian": PENALTY},
            "jacobian.weight=3.0 is of the Jacobian at the last loop; set stages.pretrain.read_out=last, or",
        ),
    ],
)
def test_stages_without_meaning_are_refused(stage, changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(stage, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": -1.0}, "jacobian.weight must not be negative, not -1.0"),
        ({"share_of_steps": 0.0}, "jacobian.share_of_steps must be in (0, 1], not 0.0"),
        ({"iterations": 3}, "jacobian.iterations=3 has no effect with jacobian.kind=frobenius; leave it at 1, or"),
    ],
)
def test_penalties_without_meaning_are_refused(fields, message):
    with pytest.raises(UserError) as caught:
        JacobianPenalty(**fields)
    assert message in str(caught.value)


def test_models_without_a_fixed_point_are_refused():
    with pytest.raises(UserError, match=r"^stages.pretrain.gradient=implicit needs the input in every .*model.injecti"):
        one_stage(IMPLICIT)
    timed = dataclasses.replace(DEQ, time_signal=TimeSignal.SINUSOID)
    with pytest.raises(UserError, match=r"^stages.pretrain.gradient=implicit needs equal loops; set model.time_signal"):
        one_stage(IMPLICIT, model=timed)


@pytest.mark.parametrize(("stage", "option"), [(IMPLICIT, "gradient=implicit"), (LAST, "jacobian.weight")])
def test_sharded_sequences_are_refused(stage, option):
    stage = dataclasses.replace(stage, jacobian=PENALTY)
    recipe = one_stage(stage, model=DEQ, mesh=MeshConfig(data=1, context=2))
    with pytest.raises(UserError, match=f"^stages.pretrain.{option} needs whole sequences on each device, and 2 devi"):
        stage_mesh(recipe, stage)


def test_a_solver_without_effect_is_named():
    notes = settings_without_effect(one_stage(dataclasses.replace(LAST, solver=Solver(max_loops=3)), model=DEQ))
    assert notes == ["note: stages.pretrain: solver=(...) has no effect with gradient=unrolled"]


def test_stages_are_read_back():
    stage = dataclasses.replace(IMPLICIT, jacobian=PENALTY)
    assert from_dict(Stage, to_dict(stage)) == stage
    assert stage.loops_text == "up to 30 (fixed point, broyden)"


def test_a_share_of_the_steps_has_the_penalty_after_the_first_ones():
    stage = dataclasses.replace(LAST, jacobian=dataclasses.replace(PENALTY, share_of_steps=0.4, after=10))

    def penalized(step):
        return draw_step(stage, jnp.array([0, 7], jnp.uint32), step, 100).penalized

    drawn = np.asarray(jax.jit(jax.vmap(penalized))(jnp.arange(100, 700, dtype=jnp.int32)))
    assert not drawn[:10].any()
    assert drawn[10:].mean() == pytest.approx(0.4, abs=0.06)


# Steps.


def steps(stage, count, mesh_config=ONE, model=DEQ):
    """Returns the metrics of steps on one batch. A resumed run repeats the last one bit for bit."""
    recipe = one_stage(stage, model=model, mesh=mesh_config, optimizer=OptimizerConfig(clip_norm=1e9))
    mesh, looped = make_mesh(mesh_config), LoopLM(recipe.model, recipe.compute)
    state = initial_state(recipe, looped, stage, mesh)
    programs = StagePrograms(recipe, looped, stage, mesh, first_step=0)
    programs.compile(programs.loops_of(np.full(4, stage.loops)))
    batch, rows = to_device(random_batch(0), stage, mesh), []
    for _ in range(count):
        before = jax.tree.map(np.array, jax.device_get(state))
        state, metrics = programs.run(stage.loops, state, batch)
        rows.append(as_values(metrics))

    resumed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), before, state)
    resumed, metrics = programs.run(stage.loops, resumed, batch)
    assert_identical(jax.device_get(resumed), jax.device_get(state))
    return rows


def assert_equal_rows(rows, others, names, rel):
    for one, other in zip(rows, others, strict=False):
        assert {name: other[name] for name in names} == {name: pytest.approx(one[name], rel=rel) for name in names}


@pytest.mark.slow
def test_an_implicit_gradient_with_a_penalty_trains_in_one_program(monkeypatch):
    traces, make = [], program.make_train_step
    monkeypatch.setattr(program, "make_train_step", lambda *a, **k: (traces.append(1), make(*a, **k))[1])
    program.compiled_step.cache_clear()

    stage = dataclasses.replace(IMPLICIT, jacobian=JacobianPenalty(weight=3.0, after=1))
    rows = steps(stage, 6)
    assert len(traces) == 1
    assert all(row["solver_residual"] < 1e-5 for row in rows)
    assert all(2 < row["solver_loops"] < 30 for row in rows)

    assert math.isnan(rows[0]["jacobian"])
    assert rows[0]["loss"] == rows[0]["expected_loss"]
    assert rows[1]["loss"] == pytest.approx(rows[1]["expected_loss"] + 3 * rows[1]["jacobian"], rel=1e-5)
    assert rows[-1]["jacobian"] < rows[1]["jacobian"]
    assert rows[-1]["expected_loss"] < rows[0]["expected_loss"]


@pytest.mark.slow
def test_an_implicit_gradient_is_that_of_many_loops_on_any_mesh():
    rows = steps(IMPLICIT, 2)
    assert_equal_rows(rows, steps(LAST, 1), ("loss", "gradient_norm"), 1e-3)

    assert_equal_rows(rows, steps(IMPLICIT, 2, MeshConfig(data=2)), ("loss", "gradient_norm", "solver_loops"), 1e-3)

    # All devices, with shards of the parameters.
    stage = dataclasses.replace(IMPLICIT, accumulation=1)
    sharded = steps(stage, 1, MeshConfig(data=2, fsdp=2, tensor=2))
    assert_equal_rows(rows, sharded, ("loss", "gradient_norm"), 1e-3)


# With an injection, and where gradients are accumulated in place without it.
@pytest.mark.slow
@pytest.mark.parametrize("model", [DEQ, MODEL])
def test_the_penalty_shrinks_the_jacobian_and_is_the_same_on_any_mesh(model):
    stage = dataclasses.replace(
        LAST, loops=3, backprop_loops=1, jacobian=dataclasses.replace(PENALTY, weight=30.0, after=1)
    )
    rows = steps(stage, 8, model=model)
    assert rows[1]["loss"] == pytest.approx(rows[1]["expected_loss"] + 30 * rows[1]["jacobian"], rel=1e-5)
    assert rows[-1]["jacobian"] < 0.9 * rows[1]["jacobian"]

    names = ("loss", "gradient_norm")
    assert_equal_rows(rows, steps(stage, 3, MeshConfig(data=2), model), names, 1e-3)
