"""The stage of LoopRPT: its loss against NumPy, its teacher, its draws, and the same results however it is computed."""

import dataclasses
import functools
import io
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from looprpt_stage_reference import expected_terms
from rich.console import Console
from training_cases import RECIPE, STAGE, assert_identical, one_stage, random_batch

from looplm_jax.checkpoints import CheckpointStore
from looplm_jax.config import LoopRPTConfig, MeshConfig, Objective, OptimizerConfig
from looplm_jax.errors import UserError
from looplm_jax.halting import exit_distribution
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training import read_metrics, run
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._looprpt import _sampled_exits, looprpt_loss, scored_batch
from looplm_jax.training._metrics import as_values
from looplm_jax.training._state import abstract_state, enter_stage, initial_state

ONE = MeshConfig(data=1)
CONFIG = LoopRPTConfig(rollouts=2, hard_share=0.5, teacher_decay=0.75)
RPT = dataclasses.replace(STAGE, name="rpt", objective=Objective.LOOPRPT, min_loops=0, looprpt=CONFIG)
STEADY = OptimizerConfig(clip_norm=1e9)


@functools.cache
def compiled(mesh=ONE, accumulation=1):
    """Returns the mesh, the recipe, the model and the programs of the stage."""
    stage = dataclasses.replace(RPT, accumulation=accumulation)
    recipe, devices = one_stage(stage, mesh=mesh, optimizer=STEADY), make_mesh(mesh)
    model = LoopLM(recipe.model, recipe.compute)
    programs = StagePrograms(recipe, model, stage, devices, first_step=0)
    programs.compile(stage.loops)
    return devices, recipe, model, programs


def start(mesh=ONE, accumulation=1):
    devices, recipe, model, _ = compiled(mesh, accumulation)
    return initial_state(recipe, model, recipe.stages[0], devices)


def step(state, batch, mesh=ONE, accumulation=1):
    """Runs one step on a copy of `state`."""
    devices, recipe, _, programs = compiled(mesh, accumulation)
    return programs.run(RPT.loops, jax.tree.map(jnp.copy, state), to_device(batch, recipe.stages[0], devices))


@functools.cache
def two_steps(mesh=ONE, accumulation=1):
    state = start(mesh, accumulation)
    for seed in range(2):
        state, metrics = step(state, random_batch(seed), mesh, accumulation)
    return jax.device_get((state, as_values(metrics)))


# The loss


def test_the_terms_of_a_batch_without_noise_equal_those_in_numpy():
    """Without noise every rollout is the plain pass, so the terms follow from two plain passes."""
    devices, recipe, model, _ = compiled()
    stage = dataclasses.replace(RPT, looprpt=dataclasses.replace(CONFIG, noise=0.0))
    state, batch = start(), to_device(random_batch(3), stage, devices)
    # In NumPy, which compiles nothing.
    params = jax.device_get(state.params)
    teacher = jax.tree.map(lambda x: x + 0.05 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)

    @jax.jit
    def metrics_of(state, batch):
        examples, totals = scored_batch(model, stage, stage.loops, state, batch)
        microbatch = jax.tree.map(lambda x: x[0], examples)
        return looprpt_loss(model, stage, stage.loops, {"params": state.params}, microbatch, totals)

    loss, measured = metrics_of(dataclasses.replace(state, teacher=teacher), batch)
    plain = jax.jit(functools.partial(model.apply, loops=stage.loops))
    wanted = expected_terms(plain, recipe.model, state.params, teacher, random_batch(3), CONFIG)
    ours = measured.looprpt
    for name in ("representation_loss", "exit_entropy", "kl", "reference_loop", "hard_tokens"):
        np.testing.assert_allclose(getattr(ours, name), wanted[name], rtol=2e-5, err_msg=name)
    assert wanted["kl"] > 1e-4
    assert 0 < wanted["hard_tokens"] < random_batch(3).loss_mask.sum()
    whole = ours.policy_loss + ours.representation_loss - 0.01 * ours.exit_entropy + 1e-3 * ours.kl
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(measured.exits.loss_per_loop, wanted["loss_per_loop"], rtol=2e-5)


def test_exits_are_drawn_from_the_exit_distribution():
    gates = jnp.broadcast_to(jnp.array([-1.0, 0.3, 9.0])[:, None, None], (3, 8, 512))
    numbers = jnp.arange(8 * 512, dtype=jnp.int32).reshape(8, 512)
    drawn = np.asarray(_sampled_exits(jax.random.key(0), numbers, gates)).ravel()
    assert drawn.min() == 1
    counts = np.bincount(drawn, minlength=4)[1:]
    expected = np.asarray(exit_distribution(gates)[:, 0, 0]) * drawn.size
    assert np.sum((counts - expected) ** 2 / expected) < 13.8  # chi-square at 2 degrees of freedom, p = 0.001


# However it is computed


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        pytest.param(MeshConfig(data=2), 2, marks=pytest.mark.slow),  # each device accumulates its own gradients
        pytest.param(ONE, 2, marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), 1, marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1, fsdp=2, context=2), 2, marks=pytest.mark.slow),
    ],
)
def test_same_results_on_every_mesh_and_with_accumulation(mesh, accumulation):
    (wanted, wanted_values), (state, values) = two_steps(), two_steps(mesh, accumulation)
    for name in ("loss", "reward", "hard_share", "policy_loss", "gradient_norm", "rollout_exit_loop", "exit_pdf"):
        np.testing.assert_allclose(values[name], wanted_values[name], rtol=2e-4, atol=1e-6, err_msg=name)
    for ours, theirs in zip(
        jax.tree.leaves((state.params, state.teacher)), jax.tree.leaves((wanted.params, wanted.teacher)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=3e-4)


@pytest.mark.slow
def test_a_run_resumes_with_the_same_rollouts_and_teacher_bit_for_bit(tmp_path):
    stage = dataclasses.replace(RPT, steps=4, warmup_steps=0)
    recipe = one_stage(stage)

    def trained(folder):
        run.train(recipe, folder, console=Console(file=said))
        mesh, model = make_mesh(recipe.mesh), LoopLM(recipe.model, recipe.compute)
        store = CheckpointStore(folder / "checkpoints", keep=9)
        return store.restore(lambda _: abstract_state(recipe, model, stage, mesh)).state

    said = io.StringIO()
    wanted = trained(tmp_path / "run")
    assert "reward" in said.getvalue()
    rows = read_metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    assert_identical(trained(tmp_path / "run"), wanted)
    assert "resuming from step 2" in said.getvalue()
    again = read_metrics(tmp_path / "run")
    for name in ("loss", "reward", "hard_share", "policy_loss", "representation_loss", "rollout_exit_loop"):
        assert [row[name] for row in again if name in row] == [row[name] for row in rows if name in row]
        assert all(np.isfinite(row[name]) for row in rows if row["kind"] == "train")


# The teacher


def test_the_teacher_starts_as_the_parameters_and_follows_each_step():
    state = start()
    assert_identical(state.teacher, state.params)
    after, _ = step(state, random_batch(0))
    wanted = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, state.params, after.params)
    for ours, theirs in zip(jax.tree.leaves(after.teacher), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)
    assert float(jnp.abs(after.params["head"] - after.teacher["head"]).max()) > 1e-4


@pytest.mark.parametrize("broken", ["parameter", "mask"])
def test_a_skipped_step_and_one_without_hard_tokens_leave_the_teacher(broken):
    state, batch = start(), random_batch(0)
    moved = jax.tree.map(lambda x: x + 1, state.teacher)
    if broken == "parameter":
        params = {**state.params, "embedding": state.params["embedding"].at[:, 0].set(jnp.inf)}
        state = dataclasses.replace(state, params=params)
    else:
        batch = dataclasses.replace(batch, loss_mask=np.zeros_like(batch.loss_mask))
    state = dataclasses.replace(state, teacher=moved)
    after, metrics = step(state, batch)
    assert_identical((after.params, after.optimizer, after.teacher), (state.params, state.optimizer, state.teacher))
    assert int(metrics.skipped) == (broken == "parameter")
    assert np.isnan(as_values(metrics)["reward"])


def test_a_teacher_starts_as_the_parameters_of_each_stage():
    later = dataclasses.replace(RPT, name="later", trainable=("core", "gate"))
    plain = dataclasses.replace(STAGE, name="plain")
    recipe = dataclasses.replace(RECIPE, stages=(RPT, later, plain), optimizer=STEADY)
    devices, _, model, _ = compiled()
    before, _ = two_steps()
    second = enter_stage(before, recipe, model, 1, devices)
    assert set(second.teacher) == {"core", "gate"}  # the others are those of the student
    assert_identical(second.teacher, {name: second.params[name] for name in ("core", "gate")})
    assert_identical(second.params, jax.device_put(before.params))
    assert enter_stage(second, recipe, model, 2, devices).teacher is None


# Refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": 1}, r"stages.rpt: objective=looprpt compares loops with each other and needs at least 2; set"),
        ({"min_loops": 1}, r"set stages.rpt.loops or stages.rpt.min_loops"),
        ({"looprpt": {"rollouts": 1}}, r"looprpt.rollouts must be at least 2, because rollouts are compared"),
        ({"looprpt": {"hard_share": 0.0}}, r"looprpt.hard_share must be in \(0, 1\], not 0.0"),
        ({"looprpt": {"teacher_decay": 1.5}}, r"looprpt.teacher_decay must be in \[0, 1\], not 1.5"),
        ({"looprpt": {"noise": -0.1}}, r"looprpt.noise must not be negative, not -0.1"),
    ],
)
def test_settings_without_meaning_are_refused_in_one_line(changes, message):
    def make():
        config = LoopRPTConfig(**changes.get("looprpt", {}))
        dataclasses.replace(RPT, **{**changes, "looprpt": config})

    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
