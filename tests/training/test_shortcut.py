"""Stages with a second pass of fewer loops: its draws, its losses and gradients, and refusals."""

import dataclasses

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
    MeshConfig,
    Objective,
    OptimizerConfig,
    ReadOut,
    Schedule,
    Shortcut,
    Stage,
    TimeSignal,
)
from looplm_jax.errors import UserError
from looplm_jax.models import LoopLM, LoopTime, head_matrix
from looplm_jax.sharding import make_mesh
from looplm_jax.training import _compile as program
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._draws import draw_short, draw_step
from looplm_jax.training._goodput import forward_flops_per_token, train_flops_per_token
from looplm_jax.training._metrics import as_values
from looplm_jax.training._state import initial_state

LOOPS = 4
MODULATED = dataclasses.replace(MODEL, loops=LOOPS, time_signal=TimeSignal.MODULATION)
SHORTCUT = dataclasses.replace(
    STAGE,
    objective=Objective.LAST_LOSS,
    read_out=ReadOut.LAST,
    loops=LOOPS,
    min_loops=0,
    accumulation=2,
    schedule=Schedule.CONSTANT,
    warmup_steps=0,
    shortcut=Shortcut(weight_loss=0.5, weight_state=0.25),
)
ONE = MeshConfig(data=1)


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_out": ReadOut.EVERY_LOOP}, "stages.pretrain.shortcut compares the last states of two passes; set"),
        ({"gradient": Gradient.IMPLICIT}, "stages.pretrain.read_out=last and stages.pretrain.gradient=unrolled"),
        ({"backprop_loops": 2}, "shortcut shortens a fixed number of loops, all with gradients; set"),
        ({"depth": DepthConfig(kind=DepthKind.POISSON)}, "set stages.pretrain.depth.kind=fixed"),
        ({"loops": 1}, "stages.pretrain.shortcut needs at least 2 loops to skip one; set stages.pretrain.loops"),
    ],
)
def test_stages_without_a_shorter_pass_are_refused(changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(SHORTCUT, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_negative_weights_are_refused():
    with pytest.raises(UserError, match=r"^shortcut.weight_state must not be negative, not -0.1$"):
        Shortcut(weight_state=-0.1)


def test_stages_are_read_back():
    assert from_dict(Stage, to_dict(SHORTCUT)) == SHORTCUT


# Draws


def test_drawn_steps_are_those_of_the_published_code():
    drawn = jax.jit(jax.vmap(lambda key: draw_short(key, 8)))(jax.random.split(jax.random.key(0), 4000))
    loops, steps = np.asarray(drawn.loops), np.asarray(drawn.steps)

    np.testing.assert_allclose(np.bincount(loops, minlength=8)[1:] / len(loops), 1 / 7, atol=0.02)
    np.testing.assert_array_equal((steps > 0).sum(axis=1), loops)
    np.testing.assert_array_equal((steps > 0).argmin(axis=1)[loops < 7], loops[loops < 7])  # zeros are at the end
    np.testing.assert_array_equal(steps.sum(axis=1), 1)
    np.testing.assert_array_equal(steps * 8, np.rint(steps * 8))

    # The first of three steps leaves two eighths; the second is uniform in what it may take.
    threes = np.rint(8 * steps[loops == 3]).astype(int)
    np.testing.assert_allclose(np.bincount(threes[:, 0])[1:] / len(threes), 1 / 6, atol=0.06)
    after_one = threes[threes[:, 0] == 1]
    np.testing.assert_allclose(np.bincount(after_one[:, 1])[1:].max(), len(after_one) / 6, rtol=0.7)


def test_a_second_pass_costs_that_of_half_the_loops():
    arguments = {"sequence_length": 16, "read_out": ReadOut.LAST}
    whole = train_flops_per_token(MODULATED, loops=LOOPS, **arguments)
    both = train_flops_per_token(MODULATED, loops=LOOPS, short_loops=SHORTCUT.mean_short_loops, **arguments)
    assert both - whole == 3 * forward_flops_per_token(MODULATED, loops=LOOPS / 2, **arguments)


# Steps


def reference(model, params, batch, short):
    """Returns the loss of a batch, from loops written out, and its parts."""
    variables, weights = {"params": params}, jnp.asarray(batch.loss_mask / batch.loss_mask.sum())

    def states(steps):
        arrays = {"positions": batch.positions, "segment_ids": batch.segment_ids}
        context, embedded, _ = model.apply(variables, batch.tokens, method="begin", **arrays)
        state, start = model.apply(variables, embedded, method="initial_state"), 0.0
        for done, step in enumerate(steps):
            time = LoopTime(start=jnp.asarray(start, jnp.float32), step=jnp.asarray(step, jnp.float32))
            output, _, _ = model.apply(variables, state, embedded, context, done, time=time, method="loop_step")
            state, start = output.state, start + step
        return output.hidden

    def cross_entropy(hidden):
        log_probs = jax.nn.log_softmax(hidden @ head_matrix(params, model.config))
        return -jnp.sum(weights * jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0])

    whole, fewer = states([1 / LOOPS] * LOOPS), states(short)
    distance = jnp.sum(weights * jnp.mean((jax.lax.stop_gradient(whole) - fewer) ** 2, axis=-1))
    parts = cross_entropy(whole), cross_entropy(fewer), distance
    return parts[0] + 0.5 * parts[1] + 0.25 * parts[2], parts


def start_of(recipe, mesh_config):
    """Returns the mesh, the model, and a state whose modulation is not zero."""
    mesh, model = make_mesh(mesh_config), LoopLM(recipe.model, recipe.compute)
    state, random = initial_state(recipe, model, SHORTCUT, mesh), np.random.default_rng(0)

    def drawn(leaf):
        return jax.device_put(random.normal(0.1, 0.3, leaf.shape).astype(np.float32), leaf.sharding)

    return mesh, model, dataclasses.replace(state, params=jax.tree.map(drawn, state.params))


def programs_of(config):
    """Returns the compiled program of a stage, its first state, and a batch on the device and for the reference."""
    recipe, batch = one_stage(SHORTCUT, model=config, optimizer=OptimizerConfig(clip_norm=1e9)), random_batch(0)
    mesh, model, state = start_of(recipe, ONE)
    programs = StagePrograms(recipe, model, SHORTCUT, mesh, first_step=0)
    programs.compile(programs.loops_of(np.full(4, LOOPS)))
    return programs, model, state, to_device(batch, SHORTCUT, mesh), jax.tree.map(jnp.asarray, batch)


def loops_of_step(state):
    """Returns the steps of the second pass that is drawn from a state."""
    short = draw_step(SHORTCUT, jnp.asarray(state.key), jnp.asarray(state.step), 0).short
    return [float(size) for size in short.steps[: int(short.loops)]]


@pytest.mark.slow
def test_one_program_serves_all_draws_and_a_resumed_run_repeats_them(monkeypatch):
    traces, make = [], program.make_train_step
    monkeypatch.setattr(program, "make_train_step", lambda *a, **k: (traces.append(1), make(*a, **k))[1])
    program.compiled_step.cache_clear()

    programs, _, state, batch, _ = programs_of(MODULATED)
    drawn, rows = [], []
    for _ in range(3):
        before = jax.tree.map(np.array, jax.device_get(state))
        drawn.append(loops_of_step(before))
        state, metrics = programs.run(LOOPS, state, batch)
        rows.append(as_values(metrics))
    assert len({len(steps) for steps in drawn}) > 1
    assert len(traces) == 1
    for row in rows:
        parts = row["expected_loss"] + 0.5 * row["shortcut_loss"] + 0.25 * row["shortcut_state"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert row["shortcut_state"] > 1e-3

    resumed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), before, state)
    resumed, _ = programs.run(LOOPS, resumed, batch)
    assert_identical(jax.device_get(resumed), jax.device_get(state))


# With modulation, and where gradients are accumulated in place without it.
@pytest.mark.slow
@pytest.mark.parametrize("config", [MODULATED, dataclasses.replace(MODEL, loops=LOOPS)])
def test_losses_and_gradients_are_those_of_two_passes(config):
    programs, model, state, batch, plain = programs_of(config)
    drawn, params = loops_of_step(state), jax.tree.map(np.array, jax.device_get(state.params))
    _, metrics = programs.run(LOOPS, state, batch)

    of_parameters = jax.value_and_grad(lambda params: reference(model, params, plain, drawn), has_aux=True)
    (loss, (whole, fewer, distance)), gradients = jax.jit(of_parameters)(params)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(jax.device_get(gradients))))
    wanted = {"loss": loss, "shortcut_loss": fewer, "shortcut_state": distance, "gradient_norm": norm}
    assert float(whole) != pytest.approx(float(fewer), rel=1e-3)
    found = as_values(metrics)
    assert {name: found[name] for name in wanted} == {
        name: pytest.approx(float(value), rel=1e-4) for name, value in wanted.items()
    }


@pytest.mark.slow
def test_a_shortcut_is_the_same_on_any_mesh():
    first, second = [], []
    for mesh_config, accumulation in ((ONE, 2), (MeshConfig(data=2, fsdp=2, tensor=2), 1)):
        stage = dataclasses.replace(SHORTCUT, accumulation=accumulation)
        recipe = one_stage(stage, model=MODULATED, mesh=mesh_config)
        mesh, model, state = start_of(recipe, mesh_config)
        programs = StagePrograms(recipe, model, stage, mesh, first_step=0)
        programs.compile(LOOPS)
        for rows in (first, second):
            state, metrics = programs.run(LOOPS, state, to_device(random_batch(0), stage, mesh))
            rows.append(as_values(metrics))

    # AdamW's first update has the size of the learning rate even where gradients are rounding errors.
    for rows, rel in ((first, 1e-4), (second, 1e-2)):
        names = ("loss", "gradient_norm", "shortcut_loss", "shortcut_state")
        assert {name: rows[1][name] for name in names} == {
            name: pytest.approx(rows[0][name], rel=rel) for name in names
        }
