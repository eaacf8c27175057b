"""The objective `ponder`: its loss, metrics and gradients on any mesh, and the stages that it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import MODEL, RECIPE, STAGE, one_stage, random_batch

from looplm_jax.config import (
    DepthConfig,
    DepthKind,
    GatePlacement,
    MeshConfig,
    Objective,
    OptimizerConfig,
    ReadOut,
    Schedule,
)
from looplm_jax.errors import UserError
from looplm_jax.losses import token_losses
from looplm_jax.models import LoopLM, head_matrix, mixed_loops
from looplm_jax.sharding import make_mesh
from looplm_jax.training import train_flops_per_token
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._metrics import as_values
from looplm_jax.training._state import initial_state

HALTING = dataclasses.replace(MODEL, loops=3, gate=GatePlacement.BEFORE, gate_bias=-1.0)
PONDER = dataclasses.replace(
    STAGE,
    objective=Objective.PONDER,
    loops=3,
    min_loops=0,
    accumulation=2,
    ponder_weight=2.0,
    act_epsilon=0.3,
    schedule=Schedule.CONSTANT,
    warmup_steps=0,
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read_out": ReadOut.LAST}, "objective=ponder reads the mixed state, not that of the last loop; set"),
        ({"min_loops": 1}, "finds the number of loops of each token; set stages.pretrain.depth.kind=fixed and"),
        ({"depth": DepthConfig(kind=DepthKind.POISSON)}, "objective=ponder finds the number of loops of each token"),
        ({"loops": 1}, "objective=ponder mixes loops and needs at least 2; set stages.pretrain.loops"),
        ({"act_epsilon": 0.0}, "stages.pretrain.act_epsilon must be in (0, 1), not 0.0"),
        ({"ponder_weight": -1.0}, "stages.pretrain.ponder_weight must not be negative, not -1.0"),
        ({"backprop_loops": 2}, "backprop_loops=2 needs stages.pretrain.read_out=last"),
    ],
)
def test_stages_without_meaning_are_refused(changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(PONDER, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_without_gate_is_refused():
    with pytest.raises(
        UserError, match=r"^stages.pretrain.objective=ponder needs an exit gate; set .*model.gate=after"
    ):
        one_stage(PONDER, model=dataclasses.replace(MODEL, gate=GatePlacement.NONE))
    with pytest.raises(UserError, match=r"^model.gate_bias=1.0 needs a gate; set model.gate=after, or model.gate_bi"):
        dataclasses.replace(MODEL, gate=GatePlacement.NONE, gate_bias=1.0)


def steps(mesh_config, count):
    """Returns the metrics of steps on one batch, and the parameters before them."""
    recipe = one_stage(PONDER, model=HALTING, mesh=mesh_config, optimizer=OptimizerConfig(clip_norm=1e9))
    mesh, model = make_mesh(mesh_config), LoopLM(recipe.model, recipe.compute)
    state = initial_state(recipe, model, PONDER, mesh)
    params = jax.tree.map(jnp.copy, state.params)  # the step takes the buffers of its state
    programs = StagePrograms(recipe, model, PONDER, mesh, first_step=0)
    programs.compile(3)
    batch, rows = to_device(random_batch(0), PONDER, mesh), []
    for _ in range(count):
        state, metrics = programs.run(3, state, batch)
        rows.append(as_values(metrics))
    return rows, params


@pytest.mark.slow
def test_the_loss_is_that_of_the_mix_plus_the_cost_and_the_cost_shortens_loops():
    rows, params = steps(MeshConfig(data=1), 6)
    batch = random_batch(0)
    output = jax.jit(
        lambda params: mixed_loops(
            LoopLM(HALTING, RECIPE.compute),
            {"params": params},
            jnp.asarray(batch.tokens),
            loops=3,
            epsilon=0.3,
            positions=jnp.asarray(batch.positions),
            segment_ids=jnp.asarray(batch.segment_ids),
        )
    )(params)
    losses = token_losses(output.hidden[None], head_matrix(params, HALTING), jnp.asarray(batch.targets), chunk=16)[0]

    def mean(values):
        return np.sum(np.asarray(values) * batch.loss_mask) / batch.loss_mask.sum()

    ponder = mean(output.updates) + mean(output.remainders)
    first = rows[0]
    assert first["loss"] == pytest.approx(mean(losses) + 2.0 * ponder, rel=1e-5)
    assert first["expected_loss"] == pytest.approx(mean(losses), rel=1e-5)
    assert first["loss_per_loop"] == [pytest.approx(mean(losses), rel=1e-5)]
    assert first["ponder_cost"] == pytest.approx(ponder, rel=1e-5)
    assert first["loops_run"] == pytest.approx(mean(output.updates), rel=1e-5)
    assert first["exit_pdf"] == pytest.approx([mean(weights) for weights in output.weights], rel=1e-5)
    assert first["mean_exit_loop"] == pytest.approx(np.dot([1, 2, 3], first["exit_pdf"]), rel=1e-5)

    # The remainder alone has a gradient, and it falls where tokens halt earlier.
    costs = [row["ponder_cost"] for row in rows]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] - 0.1

    # Each device accumulates its own gradients, of which the second step shows the effect.
    others, _ = steps(MeshConfig(data=2), 2)
    for one, other in zip(rows, others, strict=False):
        for name in ("loss", "ponder_cost", "gradient_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-4)


def test_coda_and_head_are_computed_once():
    model = dataclasses.replace(HALTING, coda_layers=1)
    of = {"sequence_length": 16, "objective": Objective.PONDER}
    once = train_flops_per_token(dataclasses.replace(model, vocab_size=112), loops=3, **of)
    assert once - train_flops_per_token(model, loops=3, **of) == 3 * 2 * 16 * 100
