"""Plans of really compiled programs: for the CPU of this machine, and for TPUs that are not attached."""

import dataclasses
import functools

import jax
import pytest
from plan_cases import GATE, MODEL, STAGE, recipe_with, with_stage

from looplm_jax.config import Gather, LoopRPTConfig, MeshConfig, Objective, PolicyConfig, Reduce, Remat
from looplm_jax.models._looplm import LoopLM
from looplm_jax.planning._budget import Memory, overfull_memory, shard_bytes, state_memory
from looplm_jax.planning._compiler import OutOfMemory
from looplm_jax.planning._search import stack_parameters
from looplm_jax.planning._stage_plan import engine_bytes, plan_stage
from looplm_jax.planning._targets import find_target
from looplm_jax.training._compile import lower_step, stage_mesh
from looplm_jax.training._state import abstract_state

needs_compiler = pytest.mark.usefixtures("tpu_compiler")


@pytest.fixture
def tpu_compiler():
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")


def sent(plan, kind):
    return sum(each.bytes for each in plan.inside.collectives if each.kind == kind and each.in_loop_over_t)


@needs_compiler
@pytest.mark.slow
def test_a_small_step_for_v5e():
    """Weights are gathered before the loops, and gradients are summed after them. Attention is splash attention, every
    product is in bfloat16, and the whole state is donated.
    """
    stage = with_stage(batch_size=8, sequence_length=128)
    recipe = recipe_with(stage, gather=Gather.PER_STEP, reduce=Reduce.STEP)
    plan = plan_stage(recipe, stage, find_target("v5e:2x2"))
    assert plan.fits
    assert plan.advice == ()
    assert (plan.devices, plan.mesh["fsdp"]) == (4, 4)
    assert plan.inside.attention == "splash"
    assert plan.inside.matmuls.by_type.keys() == {"bf16"}
    assert plan.inside.matmuls.float32_at == ()
    assert plan.inside.donated == plan.inside.state_arrays
    assert [each for each in plan.inside.collectives if each.loops] == []
    gradients = 4 * stack_parameters(recipe.model)
    reduced = sum(each.bytes for each in plan.inside.collectives if each.kind in ("reduce-scatter", "all-reduce"))
    assert 0.75 * gradients < reduced < 4 * gradients
    assert plan.timing.step == max(plan.timing.compute + plan.timing.waiting, plan.timing.links) > 0
    assert plan.timing.peak < plan.timing.compute
    assert 0 < plan.memory.parameters < plan.memory.optimizer < plan.memory.total < plan.memory.capacity == 16 * 2**30


@needs_compiler
@pytest.mark.slow
def test_gathering_once_a_step_saves_what_the_loops_would_send():
    """Forward and backward passes of three loops and two microbatches: one all-gather instead of twelve."""
    target = find_target("v5e:2x2")
    plans = [plan_stage(recipe_with(STAGE, gather=each), STAGE, target) for each in Gather]
    gathered = [
        sum(each.bytes for each in plan.inside.collectives if each.kind in ("all-gather", "collective-permute"))
        for plan in plans
    ]
    stack = dataclasses.replace(plans[0].memory, optimizer=0).parameters
    assert sent(plans[1], "all-gather") == 0
    assert gathered[0] - gathered[1] > 8 * stack
    assert sent(plans[1], "reduce-scatter") > 0


@needs_compiler
@pytest.mark.tpu_compile
def test_layers_may_start_from_the_memory_of_the_host():
    stage = with_stage(accumulation=1, sequence_length=1024)
    plans = [
        plan_stage(recipe_with(stage, remat=remat), stage, find_target("v5e:2x2"))
        for remat in (Remat.LAYER, Remat.OFFLOAD)
    ]
    assert plans[0].memory.host == 0 < plans[1].memory.host
    assert plans[1].memory.activations < plans[0].memory.activations


@needs_compiler
@pytest.mark.slow
def test_a_stage_that_does_not_fit_says_what_to_change():
    stage = with_stage(batch_size=1024, sequence_length=2**15, accumulation=1)
    plan = plan_stage(recipe_with(stage), stage, find_target("v5e:2x2"))
    assert not plan.fits
    assert plan.inside is plan.timing is None
    assert plan.memory.total > plan.memory.capacity
    assert plan.advice == ("split the batch into more microbatches: --stages.first.accumulation 2",)


@needs_compiler
@pytest.mark.slow
def test_two_slices_keep_the_weights_within_each():
    recipe = recipe_with(STAGE, mesh=MeshConfig(data=2, fsdp=-1))
    plan = plan_stage(recipe, STAGE, find_target("v5e:2x2", slices=2))
    crossing = {each.kind for each in plan.inside.collectives if each.between_slices}
    assert plan.timing.network > 0
    assert crossing == {"all-reduce"}


SMALL = with_stage(batch_size=4, accumulation=1, sequence_length=32)
CUT = MeshConfig(data=2, fsdp=2, tensor=2)


@functools.cache
def compiled_here(stage, mesh_config):
    """Returns the state of a stage and its compiled train step on the devices of this machine."""
    recipe = recipe_with(stage, mesh=mesh_config)
    mesh, model = stage_mesh(recipe, stage, find_target("here").devices), LoopLM(recipe.model, recipe.compute)
    program = lower_step(recipe, model, stage, mesh, first_step=0, loops=stage.loops).compile()
    return abstract_state(recipe, model, stage, mesh), program


ANSWERS = dataclasses.replace(
    SMALL,
    objective=Objective.POLICY_GRADIENT,
    policy=PolicyConfig(answers=2, max_new_tokens=8, slots=4, kl_weight=0.1),
)
RPT = dataclasses.replace(SMALL, objective=Objective.LOOPRPT, looprpt=LoopRPTConfig(rollouts=2))


@pytest.mark.parametrize(
    ("stage", "mesh"),
    [
        pytest.param(SMALL, CUT, id="first"),
        pytest.param(GATE, None, id="gate"),
        pytest.param(RPT, CUT, id="looprpt", marks=pytest.mark.slow),
    ],
)
def test_here_the_state_is_donated_whole(stage, mesh):
    """The compiled program updates as many bytes in place as the state has."""
    state, program = compiled_here(stage, mesh)
    assert program.memory_analysis().alias_size_in_bytes == shard_bytes(state)
    held = state_memory(state, None)
    assert held.total == shard_bytes(state)
    assert held.parameters == shard_bytes((state.params, state.teacher))


def test_the_engine_of_answers_is_counted():
    """Its cache has keys and values of every loop, layer and position of each slot, here of 32 positions."""
    model = LoopLM(MODEL)
    mesh = stage_mesh(recipe_with(ANSWERS, mesh=CUT), ANSWERS, find_target("here").devices)
    positions = ANSWERS.policy.slots * ANSWERS.sequence_length
    cache = positions * ANSWERS.loops * MODEL.num_layers * 2 * MODEL.width * 4
    # Two devices divide the heads. Beside the pages of the slots there is at most one.
    assert cache / 2 <= engine_bytes(model, ANSWERS, mesh) <= cache / 2 * (ANSWERS.policy.slots + 1) / 4
    assert engine_bytes(model, SMALL, mesh) == 0
    held = Memory(parameters=1, optimizer=2, activations=3, other=4)
    assert dataclasses.replace(held, engine=5).total == held.total + 5


def test_the_logits_stay_cut_along_the_vocabulary():
    """Two devices shard the vocabulary: no array has all of it and positions, and no collective has it whole."""
    vocabulary, text = recipe_with(SMALL).model.vocab_size, compiled_here(SMALL, CUT)[1].as_text()
    assert f",{vocabulary // 2}]" in text
    assert f",{vocabulary}]" not in text


def test_the_compilers_refusal_is_an_account():
    mesh = stage_mesh(recipe_with(STAGE, mesh=MeshConfig(data=4)), STAGE, find_target("here").devices)
    state = abstract_state(recipe_with(STAGE), LoopLM(recipe_with().model), STAGE, mesh)
    memory = overfull_memory(state, OutOfMemory(used=3 * 2**30, limit=2**30))
    assert (memory.total, memory.capacity) == (3 * 2**30, 2**30)
    assert memory.parameters == shard_bytes(state.params)


def test_on_an_unknown_chip_nothing_is_said_of_time():
    assert jax.default_backend() == "cpu"
    plan = plan_stage(recipe_with(GATE, mesh=MeshConfig(data=4)), GATE, find_target("here"))
    assert plan.timing is None
    assert plan.fits
    assert plan.memory.capacity is None
    assert plan.inside.attention == "xla"
