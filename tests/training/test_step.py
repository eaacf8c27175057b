import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from training_cases import GATE, MODEL, RECIPE, STAGE, assert_identical, one_stage, random_batch

from looplm_jax.config import (
    Dtype,
    GatePlacement,
    GateTarget,
    InitialState,
    Injection,
    Objective,
    OptimizerConfig,
    PriorConfig,
    PriorKind,
    Schedule,
)
from looplm_jax.losses import token_losses
from looplm_jax.models._looplm import LoopLM, head_matrix
from looplm_jax.sharding import make_mesh, use_mesh
from looplm_jax.training._compile import StagePrograms, abstract_batch, to_device
from looplm_jax.training._depth import draw_depths
from looplm_jax.training._metrics import as_values
from looplm_jax.training._state import abstract_state, enter_stage, initial_state, split_params
from looplm_jax.training._step import make_train_step

MESH = make_mesh(RECIPE.mesh)
LOOPS = 2
STEADY = OptimizerConfig(clip_norm=1e9, weight_decay=0.1)
LAST = dataclasses.replace(STAGE, objective=Objective.LAST_LOSS, accumulation=2)


def model_of(recipe):
    return LoopLM(recipe.model, recipe.compute)


@functools.cache
def compiled(stage, loops=LOOPS):
    recipe = one_stage(stage, optimizer=STEADY, log_every=2)
    programs = StagePrograms(recipe, model_of(recipe), stage, MESH, first_step=0)
    programs.compile(loops)
    return programs


def start(stage):
    recipe = one_stage(stage, optimizer=STEADY)
    return initial_state(recipe, model_of(recipe), stage, MESH)


def step(stage, state, batch):
    """Runs one step on a copy of `state`."""
    return compiled(stage).run(LOOPS, jax.tree.map(jnp.copy, state), to_device(batch, stage, MESH))


def test_accumulation_equals_the_whole_batch_whatever_the_masks():
    batch = random_batch(0)
    counts = batch.loss_mask.sum(axis=1)
    assert counts[2:].sum() > 2 * counts[:2].sum()
    whole, whole_metrics = step(STAGE, start(STAGE), batch)
    parts = dataclasses.replace(STAGE, accumulation=2)
    summed, metrics = step(parts, start(parts), batch)
    for name in ("loss", "gradient_norm", "learning_rate", "tokens"):
        np.testing.assert_allclose(getattr(metrics, name), getattr(whole_metrics, name), rtol=1e-5, err_msg=name)
    for ours, wanted in zip(jax.tree.leaves(metrics.exits), jax.tree.leaves(whole_metrics.exits), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5)
    moments, wanted = jax.tree.leaves(summed.optimizer), jax.tree.leaves(whole.optimizer)
    for ours, theirs in zip(moments, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_step_follows_its_direction_and_counts_itself():
    state = start(STAGE)
    after, metrics = step(STAGE, state, random_batch(0))
    assert (int(after.step), int(after.guard.accepted), int(after.guard.skipped)) == (1, 1, 0)
    assert float(metrics.learning_rate) == pytest.approx(STAGE.learning_rate / STAGE.warmup_steps)
    assert int(metrics.tokens) == random_batch(0).loss_mask.sum()
    np.testing.assert_array_equal(after.key, state.key)
    gradient = after.optimizer[1].mu["head"] / (1 - STEADY.b1)
    wanted = jnp.sign(gradient) + STEADY.weight_decay * state.params["head"]
    moved = (state.params["head"] - after.params["head"]) / metrics.learning_rate
    clear = np.abs(gradient) > 1e-4
    assert clear.sum() > 50
    np.testing.assert_allclose(moved[clear], wanted[clear], rtol=1e-2)


@pytest.mark.parametrize("broken", ["parameter", "mask"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(broken):
    state, batch = start(STAGE), random_batch(0)
    if broken == "parameter":
        params = {**state.params, "embedding": state.params["embedding"].at[:, 0].set(jnp.inf)}
        state = dataclasses.replace(state, params=params)
    else:
        batch = dataclasses.replace(batch, loss_mask=np.full_like(batch.loss_mask, np.nan))
    after, metrics = step(STAGE, state, batch)
    assert not np.isfinite(metrics.loss)
    assert_identical(after.params, state.params)
    assert_identical(after.optimizer, state.optimizer)
    assert_identical(after.guard.losses, state.guard.losses)
    assert (int(after.step), int(metrics.skipped), int(metrics.skipped_in_a_row)) == (1, 1, 1)
    after, metrics = step(STAGE, after, batch)
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (2, 2)


@pytest.mark.parametrize(
    "stage", [STAGE, GATE, dataclasses.replace(STAGE, accumulation=2)], ids=["text", "gate", "parts"]
)
def test_a_step_without_targets_changes_nothing_and_is_not_counted(stage):
    before, _ = step(stage, start(stage), random_batch(0))
    before = dataclasses.replace(before, guard=dataclasses.replace(before.guard, skipped_in_a_row=jnp.int32(3)))
    empty = dataclasses.replace(random_batch(1), loss_mask=np.zeros_like(random_batch(1).loss_mask))
    after, metrics = step(stage, before, empty)
    assert_identical(dataclasses.replace(after, step=before.step), before)
    assert int(after.step) == int(before.step) + 1
    assert (int(metrics.tokens), int(metrics.skipped)) == (0, int(before.guard.skipped))
    values = as_values(metrics)
    assert np.isnan([values["loss"], values["mean_exit_loop"], *values["loss_per_loop"], *values["exit_pdf"]]).all()


def test_a_part_without_targets_changes_nothing_of_its_step():
    batch = random_batch(0)
    batch.loss_mask[2:] = 0
    parts = dataclasses.replace(STAGE, accumulation=2)
    whole, wanted = step(STAGE, start(STAGE), batch)
    after, metrics = step(parts, start(parts), batch)
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.gradient_norm, wanted.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(after.guard.losses, whole.guard.losses, rtol=1e-5)


def test_a_spike_changes_nothing_and_the_next_good_step_ends_the_row():
    state, batch = start(STAGE), random_batch(0)
    full = jnp.int32(state.guard.losses.shape[0])
    low = dataclasses.replace(state.guard, losses=jnp.full_like(state.guard.losses, 0.1), accepted=full)
    after, metrics = step(STAGE, dataclasses.replace(state, guard=low), batch)
    assert_identical((after.params, after.optimizer), (state.params, state.optimizer))
    assert int(metrics.skipped_in_a_row) == 1
    calm = dataclasses.replace(after, guard=dataclasses.replace(after.guard, accepted=jnp.int32(0)))
    after, metrics = step(STAGE, calm, batch)
    assert (int(metrics.skipped), int(metrics.skipped_in_a_row)) == (1, 0)
    assert float(jnp.abs(after.params["head"] - state.params["head"]).max()) > 0


def test_the_state_is_donated():
    state = start(STAGE)
    program = compiled(STAGE)._programs[LOOPS, None]
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= 0.95 * held
    compiled(STAGE).run(LOOPS, state, to_device(random_batch(0), STAGE, MESH))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.optimizer)))


def gate_gradient(state, batch, target):
    """Returns the gradients of Eq. 5 and 6 by hand, with respect to the kernel and the bias of the gate."""
    tokens, targets, segment_ids, positions = map(
        jnp.asarray, (batch.tokens, batch.targets, batch.segment_ids, batch.positions)
    )
    output = jax.jit(model_of(one_stage(GATE)).apply, static_argnames="loops")(
        {"params": state.params}, tokens, loops=LOOPS, positions=positions, segment_ids=segment_ids
    )
    losses = token_losses(output.hidden, head_matrix(state.params, MODEL), targets)
    losses, hidden, logits = (np.asarray(x, np.float64) for x in (losses, output.hidden, output.gate_logits))
    gain = np.maximum(0, losses[:-1] - losses[1:])
    go_on = 1 / (1 + np.exp(-GATE.gain_slope * (gain - GATE.gain_threshold)))
    trained = slice(1, None) if target is GateTarget.AS_PRINTED else slice(None, -1)
    weights = batch.loss_mask / batch.loss_mask.sum() / LOOPS
    residual = (1 / (1 + np.exp(-logits[trained])) - (1 - go_on)) * weights
    return np.einsum("tbs,tbsd->d", residual, hidden[trained]), residual.sum()


@pytest.mark.parametrize("target", GateTarget)
def test_stage_two_moves_the_gate_alone_along_its_printed_gradient(target):
    stage = dataclasses.replace(GATE, gate_target=target)
    state, batch = start(stage), random_batch(1)
    # First parameters such that the loops differ.
    generator = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0, 0.5, leaf.shape), leaf.dtype), state.params)
    state = dataclasses.replace(state, params=params)
    after, metrics = step(stage, state, batch)
    moving, frozen = split_params(after.params, ("gate",))
    assert_identical(frozen, split_params(state.params, ("gate",))[1])
    assert set(after.optimizer[1].mu) == set(moving) == {"gate"}
    kernel, bias = gate_gradient(state, batch, target)
    gradient = jax.tree.map(lambda mean: mean / (1 - STEADY.b1), after.optimizer[1].mu["gate"])
    np.testing.assert_allclose(gradient["kernel"], kernel, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gradient["bias"][0], bias, rtol=1e-3, atol=1e-6)
    assert float(metrics.gradient_norm) == pytest.approx(np.sqrt((kernel**2).sum() + bias**2), rel=1e-4)
    assert not np.array_equal(after.params["gate"]["kernel"], state.params["gate"]["kernel"])


def test_the_last_loss_is_that_after_the_last_loop_and_leaves_the_gate_alone():
    state, batch = start(LAST), random_batch(1)
    after, metrics = step(LAST, dataclasses.replace(state, step=jnp.int32(1)), batch)  # the second step is logged
    _, expected = step(STAGE, state, batch)
    np.testing.assert_allclose(metrics.exits.loss_per_loop, expected.exits.loss_per_loop, rtol=1e-5)
    assert float(metrics.loss) == pytest.approx(float(expected.exits.loss_per_loop[-1]), rel=1e-5)
    np.testing.assert_allclose(metrics.exits.exit_pdf, [0.0] * (LOOPS - 1) + [1.0], rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(after.optimizer[1].mu["gate"]))

    model, given = model_of(one_stage(LAST)), jax.tree.map(jnp.asarray, dataclasses.asdict(batch))
    packed = {name: given[name] for name in ("positions", "segment_ids")}

    def all_heads_with_the_weight_on_the_last(params):
        hidden = model.apply({"params": params}, given["tokens"], loops=LOOPS, **packed).hidden
        losses = token_losses(hidden, head_matrix(params, model.config), given["targets"])
        weights = np.array([0.0] * (LOOPS - 1) + [1.0], np.float32)[:, None, None] * given["loss_mask"][None]
        return jnp.sum(losses * weights) / jnp.sum(given["loss_mask"], dtype=jnp.float32)

    loss, gradients = jax.jit(jax.value_and_grad(all_heads_with_the_weight_on_the_last))(state.params)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    moments = jax.tree.map(lambda mean: mean / (1 - STEADY.b1), after.optimizer[1].mu)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), moments, gradients)


def head_products(jaxpr, *, logged):
    """Counts the products with the vocabulary that a program runs, over all loops. `logged` picks the branches."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars)]
            total += any(MODEL.vocab_size in shape for shape in shapes)
        inner = list(jaxprs_in_params(equation.params))
        if equation.primitive.name == "cond":
            inner = [inner[logged]]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(head_products(each, logged=logged) for each in inner)
    return total


def test_the_last_loss_has_one_head_whatever_the_number_of_loops():
    stage = dataclasses.replace(STAGE, objective=Objective.LAST_LOSS)

    def program(stage, loops):
        recipe = one_stage(stage)
        state = abstract_state(recipe, model_of(recipe), stage, MESH)
        train_step = make_train_step(recipe, model_of(recipe), stage, first_step=0, loops=loops)
        with use_mesh(MESH):
            return jax.make_jaxpr(train_step)(state, abstract_batch(stage, MESH)).jaxpr

    assert head_products(program(STAGE, 4), logged=False) == 4 * 3  # logits, and gradients of states and of the head
    programs = {loops: program(stage, loops) for loops in (1, 2, 5)}
    assert {head_products(each, logged=False) for each in programs.values()} == {3}
    assert [head_products(each, logged=True) for each in programs.values()] == [3, 3 + 1, 3 + 4]


def test_losses_of_earlier_loops_are_computed_where_they_are_logged():
    state, metrics = start(LAST), []
    for _ in range(2):
        state, after = step(LAST, state, random_batch(1))
        metrics.append(as_values(after))
    assert [row["loss_per_loop"][-1] for row in metrics] == [row["loss"] for row in metrics]
    assert [row["loss_per_loop"][0] > 0 for row in metrics] == [False, True]


def test_bfloat16_is_for_the_products_only():
    recipe = one_stage(STAGE, compute=dataclasses.replace(RECIPE.compute, dtype=Dtype.BFLOAT16))
    state = abstract_state(recipe, model_of(recipe), STAGE, MESH)
    train_step = make_train_step(recipe, model_of(recipe), STAGE, first_step=0, loops=LOOPS)
    with use_mesh(MESH):
        lowered = jax.jit(train_step).lower(state, abstract_batch(STAGE, MESH))
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert sum("bf16" in line for line in products) >= 7  # the projections and the feed-forward part of a layer
    after, metrics = lowered.out_info
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, state)
    assert metrics.loss.dtype == metrics.gradient_norm.dtype == jnp.float32


@pytest.mark.parametrize("kind", PriorKind)
def test_each_prior_makes_a_program(kind):
    stage = dataclasses.replace(STAGE, prior=PriorConfig(kind=kind))
    recipe = one_stage(stage)
    state = abstract_state(recipe, model_of(recipe), stage, MESH)
    train_step = make_train_step(recipe, model_of(recipe), stage, first_step=0, loops=3)
    with use_mesh(MESH):
        _, metrics = jax.eval_shape(train_step, state, abstract_batch(stage, MESH))
    assert metrics.exits.exit_pdf.shape == (3,)


@pytest.mark.slow
def test_states_start_from_new_noise_in_every_step():
    model = dataclasses.replace(
        MODEL, injection=Injection.ADD, initial_state=InitialState.NOISE, gate=GatePlacement.NONE
    )
    # Without a learning rate to speak of, only the noise differs between steps.
    stage = dataclasses.replace(STAGE, objective=Objective.LAST_LOSS, learning_rate=1e-30, schedule=Schedule.CONSTANT)

    def losses(model):
        recipe = one_stage(stage, model=model)
        network = LoopLM(model, recipe.compute)
        programs = StagePrograms(recipe, network, stage, MESH, first_step=0)
        programs.compile(1)
        state, found = initial_state(recipe, network, stage, MESH), []
        for _ in range(2):
            state, metrics = programs.run(1, state, to_device(random_batch(0), stage, MESH))
            found.append(float(metrics.loss))
        return found

    first, second = losses(model)
    silent = losses(dataclasses.replace(model, state_std=0.0))
    assert len({first, second, *silent}) == 3


def test_random_loops_are_uniform_and_follow_from_key_and_step():
    stage = dataclasses.replace(STAGE, min_loops=2, loops=5)
    keys = [np.array([0, seed], np.uint32) for seed in range(2)]
    drawn = [[draw_depths(stage, key, step, 0)[0] for step in range(4000)] for key in keys]
    assert drawn[0] == [draw_depths(stage, keys[0], step, 0)[0] for step in range(4000)]
    assert drawn[0] != drawn[1]
    counts = np.bincount(drawn[0])
    assert (counts[:2] == 0).all()
    assert ((counts[2:] > 900) & (counts[2:] < 1100)).all()
    fixed = dataclasses.replace(stage, min_loops=0)
    assert {int(draw_depths(fixed, keys[0], step, 0)[0]) for step in range(9)} == {5}


def test_the_next_stage_keeps_the_optimizer_where_the_same_parameters_move():
    longer = dataclasses.replace(STAGE, name="longer", beta=0.0)
    recipe = dataclasses.replace(RECIPE, stages=(STAGE, longer, GATE), optimizer=STEADY)
    before, _ = step(STAGE, start(STAGE), random_batch(0))
    same = enter_stage(before, recipe, model_of(recipe), 1, MESH)
    assert_identical((same.params, same.optimizer), (before.params, before.optimizer))
    assert (int(same.guard.accepted), int(same.step)) == (0, 1)
    fresh = enter_stage(before, recipe, model_of(recipe), 2, MESH)
    assert_identical(fresh.params, before.params)
    assert set(fresh.optimizer[1].mu) == {"gate"}
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(fresh.optimizer))
