import dataclasses

import jax
import jax.numpy as jnp
import pytest
from training_cases import MODEL

from looplm_jax.config import ComputeConfig, Injection, Objective, Remat
from looplm_jax.models._looplm import LoopLM, head_matrix, init_params
from looplm_jax.models.presets import ouro_1_4b
from looplm_jax.training._goodput import forward_flops_per_token, train_flops_per_token

WIDE = dataclasses.replace(MODEL, width=64, mlp_width=160, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=512)
SHAPES = {
    "plain": WIDE,
    "prelude and coda": dataclasses.replace(WIDE, prelude_layers=1, coda_layers=1),
    "linear injection": dataclasses.replace(WIDE, injection=Injection.LINEAR),
}
ROWS, LENGTH = 2, 32


def counted_by_xla(config):
    """Returns the operations of one loop and its logits. The layers are not in a scan, which XLA would count once."""
    model = LoopLM(config, ComputeConfig(remat=Remat.NONE))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))

    def forward(params, tokens):
        output = model.apply({"params": params}, tokens, loops=1)
        return output.hidden @ head_matrix(params, config), output.gate_logits

    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    return jax.jit(forward).lower(params, tokens).compile().cost_analysis()["flops"] / (ROWS * LENGTH)


@pytest.mark.parametrize("name", SHAPES)
def test_the_formula_agrees_with_the_compiler(name):
    config = SHAPES[name]
    ours = forward_flops_per_token(config, loops=1, sequence_length=LENGTH)
    layers = config.num_layers + config.prelude_layers + config.coda_layers
    masked_half = 2 * config.num_heads * config.head_dim * (LENGTH - 1) * layers  # XLA computes it and discards it
    assert counted_by_xla(config) == pytest.approx(ours + masked_half, rel=0.04)


def test_ouro_by_hand():
    attention = 4 * 2048 * 2048 + 2048 * 4097  # four projections; scores and mixing over (4096 + 1) / 2 keys each
    layer = 2 * (attention + 3 * 2048 * 5632)
    by_hand = 4 * (24 * layer + 2 * 2048 * 49152 + 2 * 2048)
    assert forward_flops_per_token(ouro_1_4b(), loops=4, sequence_length=4096) == by_hand
    assert by_hand == pytest.approx(12.3e9, rel=0.01)  # 2 x 4 loops x 1.33e9 weights used, and attention


def test_loops_layers_and_training_multiply():
    def forward(loops, **changes):
        return forward_flops_per_token(dataclasses.replace(WIDE, **changes), loops=loops, sequence_length=LENGTH)

    assert forward(6) == 6 * forward(1)
    assert forward(1, num_layers=3) - forward(1, num_layers=2) == forward(1, num_layers=2) - forward(1)
    assert forward(4, prelude_layers=1) - forward(4) == forward(1, coda_layers=1) - forward(1)
    train = train_flops_per_token(WIDE, loops=4, sequence_length=LENGTH)
    assert train == 3 * forward(4)
    assert train_flops_per_token(WIDE, loops=4, sequence_length=LENGTH, objective=Objective.GATE) == forward(4)
    last = train_flops_per_token(WIDE, loops=4, sequence_length=LENGTH, objective=Objective.LAST_LOSS)
    assert train - last == 3 * 3 * 2 * WIDE.width * WIDE.vocab_size
    # One pass of the teacher, three of the student and of each rollout: 28 for 8 rollouts.
    rollouts = {"objective": Objective.LOOPRPT, "rollouts": 8}
    assert train_flops_per_token(WIDE, loops=4, sequence_length=LENGTH, **rollouts) == 28 * forward(4)
