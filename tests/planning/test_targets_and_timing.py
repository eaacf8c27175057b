"""The resources of slices, what steps need of them, and advice, by arithmetic without a compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from plan_cases import GATE, MODEL, STAGE, recipe_with, with_stage

from looplm_jax.config import (
    ComputeConfig,
    Gather,
    LoopRPTConfig,
    MeshConfig,
    Objective,
    PolicyConfig,
    Reduce,
    Remat,
    TopologySettings,
)
from looplm_jax.errors import UserError
from looplm_jax.planning._budget import Memory, ProgramBytes, estimate, recomputed_flops, step_flops
from looplm_jax.planning._compiler import DoesNotCompile, without_network
from looplm_jax.planning._program_facts import Collective
from looplm_jax.planning._search import Candidate, SearchResult, Trial, candidates, fastest_settings, pareto, search
from looplm_jax.planning._stage_plan import StagePlan, advice, next_accumulation
from looplm_jax.planning._targets import Target, find_target
from looplm_jax.sharding import make_mesh
from looplm_jax.sharding._hardware import CHIPS, known_chip

V5E, V5P = known_chip("TPU v5 lite"), known_chip("TPU v5")


def target(chip, shape):
    return Target(name="x", devices=tuple(jax.devices()), chip=chip, shape=shape)


@pytest.mark.parametrize(
    ("chip", "shape", "share"),
    [
        (V5E, (16, 16), 1.0),
        (V5E, (4, 4), 0.5),  # a part of a pod has no wraparound links
        (V5E, (1, 16), 0.5),
        (V5P, (4, 4, 8), 1.0),
        (V5P, (2, 2, 4), 4 / 6),
    ],
)
def test_links_of_a_slice(chip, shape, share):
    assert target(chip, shape).link_bandwidth == pytest.approx(share * chip.ici_bandwidth)


def test_every_chip_has_peaks_of_one_name():
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        assert all(known_chip(kind) is chip for kind in chip.device_kinds)
        assert chip.peak_bf16_flops > chip.hbm_bandwidth > chip.ici_bandwidth > 0
    assert known_chip("abacus") is None


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "mine")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    import os

    before = dict(os.environ)
    with without_network():
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "mine"
        assert os.environ["TPU_WORKER_HOSTNAMES"] == "localhost"
    assert dict(os.environ) == before


def test_the_best_time_is_the_longest_of_what_a_step_needs():
    sent = Collective(kind="all-reduce", loops=("loops",), devices=4, count=1, bytes=10**12, asynchronous=True)
    timing = estimate(MODEL, STAGE, Remat.LAYER, target(V5E, (16, 16)), [sent], devices=4)
    assert timing.step == timing.links == pytest.approx(10**12 / 200e9)
    assert timing.days == pytest.approx(STAGE.steps * timing.step / 86400)
    assert timing.tokens_per_second == pytest.approx(STAGE.batch_size * STAGE.sequence_length / timing.step)
    assert timing.waiting == 0
    beyond = dataclasses.replace(sent, between_slices=True)
    assert estimate(MODEL, STAGE, Remat.LAYER, target(V5E, (16, 16)), [beyond], devices=4).network > timing.links
    assert estimate(MODEL, STAGE, Remat.LAYER, target(None, ()), [sent], devices=4) is None


def test_nothing_is_computed_during_synchronous_exchanges():
    waited = Collective(kind="all-reduce", loops=(), devices=4, count=1, bytes=10**9)
    hidden = dataclasses.replace(waited, asynchronous=True)
    timing = estimate(MODEL, STAGE, Remat.LAYER, target(V5E, (16, 16)), [waited, hidden], devices=4)
    assert timing.links == 2 * timing.waiting == pytest.approx(2 * 10**9 / 200e9)
    assert timing.step == max(timing.compute + timing.waiting, timing.links)
    assert timing.model_flops_utilization == pytest.approx(timing.peak / timing.step)


def test_less_is_recomputed_where_more_is_saved():
    again = [
        recomputed_flops(MODEL, STAGE, remat) for remat in (Remat.LAYER, Remat.SAVE_OUTPUTS, Remat.SAVE_QKV, Remat.DOTS)
    ]
    tokens = STAGE.batch_size * STAGE.sequence_length * STAGE.loops * MODEL.num_layers
    queries_keys_values = 3 * 2 * MODEL.width**2
    assert again[1] - again[2] == tokens * queries_keys_values
    assert again[0] > again[1] > again[2] > again[3] == 0


def test_what_is_computed_again():
    forward = step_flops(MODEL, STAGE) / 3
    assert recomputed_flops(MODEL, STAGE, Remat.NONE) == 0
    assert 0.5 * forward < recomputed_flops(MODEL, STAGE, Remat.LAYER) < forward
    assert recomputed_flops(MODEL, GATE, Remat.LAYER) == 0


def test_what_looprpt_computes_again():
    """Without rematerialization: every rollout once, and the logits of the student and of every rollout."""
    stage = with_stage(objective=Objective.LOOPRPT, looprpt=LoopRPTConfig(rollouts=4))
    forward = step_flops(MODEL, stage) / (1 + 3 + 3 * 4)
    heads = stage.loops * 2 * MODEL.width * MODEL.vocab_size * stage.batch_size * stage.sequence_length
    assert recomputed_flops(MODEL, stage, Remat.NONE) == pytest.approx(4 * forward + heads)
    again = recomputed_flops(MODEL, STAGE, Remat.LAYER)
    assert recomputed_flops(MODEL, stage, Remat.LAYER) == pytest.approx(4 * forward + heads + 5 * again)


def test_what_an_update_from_answers_computes():
    """Every update replays all answers, forward and backward; what it compares with is replayed forward, once."""
    stage = with_stage(objective=Objective.POLICY_GRADIENT, policy=PolicyConfig(answers=8))
    policy = stage.policy
    once = step_flops(MODEL, stage)
    assert once == pytest.approx(8 * step_flops(MODEL, STAGE))
    compared = dataclasses.replace(stage, policy=dataclasses.replace(policy, kl_weight=0.1))
    assert step_flops(MODEL, compared) == pytest.approx(4 / 3 * once)
    several = dataclasses.replace(stage, policy=dataclasses.replace(policy, updates=2))
    assert step_flops(MODEL, several) == pytest.approx(7 / 3 * once)
    timing = estimate(MODEL, stage, Remat.NONE, target(V5E, (16, 16)), [], devices=4)
    assert timing.tokens_per_second == pytest.approx(8 * stage.batch_size * stage.sequence_length / timing.step)


def test_a_program_of_this_machine_has_temporaries():
    """The gradient of the sum keeps at least one product, and the updated matrix takes no memory of its own."""

    def step(matrix):
        return matrix - jax.grad(lambda matrix: jnp.sum(jnp.tanh(matrix @ matrix) ** 2))(matrix)

    size = 64 * 64 * 4
    memory = ProgramBytes.of(jax.jit(step, donate_argnums=0).lower(jnp.ones((64, 64))).compile())
    assert memory.held == size
    assert memory.temporaries >= size


def test_parts_of_a_batch():
    assert next_accumulation(with_stage(batch_size=24, accumulation=1), 4) == 2
    assert next_accumulation(with_stage(batch_size=24, accumulation=3), 4) == 6
    assert next_accumulation(with_stage(batch_size=24, accumulation=6), 4) is None


def advised(stage, mesh, memory, **compute):
    recipe = recipe_with(stage, mesh=mesh, **compute)
    return advice(recipe, stage, make_mesh(mesh), memory, (), fits=False)


def test_what_to_change_depends_on_what_is_too_large():
    spread, full = MeshConfig(data=1, fsdp=8), with_stage(accumulation=1)
    large = Memory(parameters=4, optimizer=8, activations=10, other=0, capacity=16)
    assert advised(full, spread, large) == ("split the batch into more microbatches: --stages.first.accumulation 2",)
    (first, *_) = advised(full, spread, large, gather=Gather.PER_STEP)
    assert "--compute.gather per_layer" in first
    for reduce, sooner in ((Reduce.STEP, "microbatch"), (Reduce.MICROBATCH, "loop")):
        (first, *_) = advised(full, spread, large, gather=Gather.PER_STEP, reduce=reduce)
        assert f"--compute.reduce {sooner}" in first
    assert "--compute.remat layer" in advised(full, spread, large, remat=Remat.DOTS)[0]
    assert "--mesh.data 1 --mesh.fsdp -1" in advised(full, MeshConfig(data=8), large)[-1]
    least = with_stage(accumulation=2)
    assert [line.split(": ")[1] for line in advised(least, spread, large)] == [
        "--compute.remat offload",
        "--stages.first.context 2",
    ]


def trial(step, size, *, fits=True):
    memory = Memory(parameters=0, optimizer=0, activations=size, other=0)
    timing = dataclasses.replace(estimate(MODEL, STAGE, Remat.LAYER, target(V5E, (2, 2)), [], devices=4), compute=step)
    plan = StagePlan(
        stage="s",
        target="x",
        devices=4,
        mesh={},
        fits=fits,
        memory=memory,
        inside=None,
        timing=dataclasses.replace(timing, links=0.0) if fits else None,
        advice=(),
        compile_seconds=0.0,
    )
    settings = TopologySettings(topology="v5e:2x2", accumulation=1, mesh=MeshConfig(), compute=ComputeConfig())
    candidate = Candidate(recipe=recipe_with(), stage=STAGE, settings=settings, flags="", weight=())
    return Trial(candidate=candidate, plan=plan)


def test_what_nothing_beats():
    fast, small, beaten, alike, broken = trial(1, 9), trial(3, 2), trial(3, 9), trial(1, 9), trial(0, 0, fits=False)
    assert pareto([fast, small, beaten, alike, broken]) == (fast, small, alike)


def test_the_fastest_settings_that_fit_are_chosen():
    fast, slow = trial(1, 9), trial(2, 1)
    own = dataclasses.replace(fast.candidate.settings, mesh=MeshConfig(data=2, fsdp=2, context=2), accumulation=4)
    fast = dataclasses.replace(fast, candidate=dataclasses.replace(fast.candidate, settings=own))
    result = SearchResult(trials=(fast, slow), best=(slow, fast), cannot_fit=0, skipped=0)
    assert fastest_settings(result) == own


def test_candidates_divide_and_name_their_flags():
    here = find_target("here")
    tried = list(candidates(recipe_with(STAGE), STAGE, here))
    assert len(tried) > 100
    assert len({each.flags for each in tried}) == len(tried)
    for each in tried:
        assert each.recipe.mesh_of(each.stage) == each.settings.mesh
        assert each.recipe.compute_of(each.stage) == each.settings.compute
        assert each.stage.accumulation == each.settings.accumulation
        sizes = dataclasses.astuple(each.settings.mesh)
        assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == 8
        assert each.stage.batch_size % (each.stage.accumulation * sizes[0] * sizes[1]) == 0
        assert each.recipe.stages == (each.stage,)
    assert {each.settings.compute.reduce for each in tried} == set(Reduce)


def test_what_cannot_fit_is_not_compiled():
    tight = dataclasses.replace(V5E, hbm_bytes=1)
    small = Target(name="tight", devices=tuple(jax.devices()), chip=tight, shape=(2, 4))
    with pytest.raises(UserError, match="no setting of stage first fits tight, by arithmetic alone; use more devices"):
        search(recipe_with(STAGE), STAGE, small, lambda *_: pytest.fail("compiled"), limit=3)


def test_a_search_skips_what_does_not_compile():
    def compile_plan(candidate, number, count):
        if number == 2:
            raise DoesNotCompile("stage first for x does not compile")
        return trial(number, count).plan

    result = search(recipe_with(STAGE), STAGE, find_target("here"), compile_plan, limit=3)
    assert [each.plan.timing.step for each in result.trials] == [1, 3]
    (failure,) = result.failures
    assert failure.error == "stage first for x does not compile"
    assert failure.candidate not in [each.candidate for each in result.trials]
