"""Attention on a TPU, in programs that are lowered and compiled for it."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from tpu_programs import lowered_step, tpu_mesh

from looplm_jax.config import AttentionKernel, MeshConfig, ModelConfig
from looplm_jax.models._attention_kernels import self_attention
from looplm_jax.sharding import logical_to_spec, use_mesh

KERNELS = {
    "splash_mha_fwd_segmented_residuals",
    "splash_mha_dq_segmented_no_residuals",
    "splash_mha_dkv_segmented_no_residuals",
}


def kernel_calls(text: str) -> dict[str, str]:
    """Returns the Pallas kernels that a compiled program calls: one line of each, by name."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return {re.search(r"%(splash\w+)", call)[1]: call for call in calls}


COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(text: str) -> list[str]:
    """Returns the collectives of a compiled program, in order."""
    return re.findall(rf"\b({'|'.join(COLLECTIVES)})(?:-start)?\(", text)


def lowered_kernels(text: str) -> dict[str, str]:
    """Returns the types of operands and results of each Pallas kernel that a lowered program calls, by name."""
    calls = [line for line in text.splitlines() if "@tpu_custom_call(" in line]
    return {re.search(r'kernel_name = "(\w+)"', call)[1]: call.rpartition(" : ")[2] for call in calls}


def lowered_collectives(text: str) -> list[str]:
    """Returns the collectives of a lowered program, in order."""
    names = "|".join(name.replace("-", "_") for name in COLLECTIVES)
    return re.findall(rf'"stablehlo\.({names})"', text)


def lowered_attention(topology, mesh_config, *, rows, length, heads):
    """Lowers attention, forward and backward, with rows and heads sharded as in the model."""
    mesh = tpu_mesh(topology, mesh_config)
    spread = NamedSharding(mesh, logical_to_spec("batch", "sequence", "heads", None))
    states = jax.ShapeDtypeStruct((rows, length, heads, 128), jnp.bfloat16, sharding=spread)
    places = jax.ShapeDtypeStruct(
        (rows, length), jnp.int32, sharding=NamedSharding(mesh, logical_to_spec("batch", None))
    )

    def gradients(*inputs):
        def total(*states):
            return jnp.sum(self_attention(AttentionKernel.SPLASH, *states, *inputs[3:]), dtype=jnp.float32)

        return jax.grad(total, argnums=(0, 1, 2))(*inputs[:3])

    with use_mesh(mesh):
        traced = jax.jit(gradients).trace(states, states, states, places, places)
        return traced.lower(lowering_platforms=("tpu",))


def test_the_train_step_for_v5e_is_lowered_to_splash_attention_in_bfloat16():
    """In scans over layers and loops, rematerialized, on a mesh that shards rows, parameters and heads."""
    text = lowered_step(tpu_mesh("v5e:2x4", MeshConfig(data=2, fsdp=2, tensor=2))).as_text()
    kernels = lowered_kernels(text)
    assert kernels.keys() == KERNELS
    assert all("tensor<4x256x128xbf16>" in types for types in kernels.values())  # half of the heads, of one row


def test_devices_of_a_sequence_are_told_to_trade_heads_for_positions_and_nothing_else():
    text = lowered_attention("v5e:2x4", MeshConfig(data=2, context=4), rows=2, length=1024, heads=4).as_text()
    assert lowered_kernels(text).keys() == KERNELS
    assert lowered_collectives(text) == ["all_to_all"] * 7  # three states, and the gradients of four


@pytest.mark.slow
def test_the_train_step_for_v5e_runs_splash_attention_in_bfloat16():
    text = lowered_step(tpu_mesh("v5e:2x4", MeshConfig(data=2, fsdp=2, tensor=2))).compile().as_text()
    calls = kernel_calls(text)
    assert calls.keys() == KERNELS
    assert all("bf16[4,256,128]" in call for call in calls.values())  # half of the heads, of one row


@pytest.mark.slow
def test_devices_of_a_sequence_trade_heads_for_positions_and_nothing_else():
    lowered = lowered_attention("v5e:2x4", MeshConfig(data=2, context=4), rows=2, length=1024, heads=4)
    text = lowered.compile().as_text()
    assert kernel_calls(text).keys() == KERNELS
    assert collectives(text) == ["all-to-all"] * 6  # queries, keys and values, and their gradients


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    "length",
    [
        pytest.param(4096, marks=pytest.mark.tpu_compile),
        pytest.param(16384, marks=pytest.mark.slow),
        pytest.param(65536, marks=pytest.mark.tpu_compile),
    ],
)
def test_the_blocks_of_every_generation_compile(topology, length):
    compiled = lowered_attention(topology, MeshConfig(data=-1), rows=4, length=length, heads=2).compile()
    assert kernel_calls(compiled.as_text()).keys() == KERNELS


@pytest.mark.tpu_compile
def test_64k_tokens_on_v5p_with_four_devices_to_a_sequence():
    model = ModelConfig(vocab_size=4096, width=1024, mlp_width=2816, num_layers=4, num_heads=8)
    mesh = tpu_mesh("v5p:2x2x2", MeshConfig(data=1, fsdp=2, context=4))
    compiled = lowered_step(mesh, model=model, batch_size=2, sequence_length=65536, loops=4).compile()
    assert kernel_calls(compiled.as_text()).keys() == KERNELS
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2**30
