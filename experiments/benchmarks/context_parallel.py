"""Communication of attention among devices that share a sequence: trading heads, or passing keys and values.

    python -m experiments.benchmarks.context_parallel

Compiles attention and its gradients for TPUs that need not exist here, at the shape of a layer of the 1.4B model, and
prints what each device sends and needs for one sequence. Passing keys and values around a ring moves as much as
gathering them, which is compiled here; a ring holds fewer of them at a time. Its kernel has no causal mask, which
changes neither figure.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from looplm_jax.config import AttentionKernel, MeshConfig
from looplm_jax.models import presets
from looplm_jax.models._attention_kernels import self_attention
from looplm_jax.planning._compiler import without_network
from looplm_jax.planning._hlo import parse
from looplm_jax.planning._program_facts import collectives
from looplm_jax.planning._targets import find_target
from looplm_jax.sharding import logical_to_spec, make_mesh, use_mesh

_RUN_OF_ALL_HEADS = ("batch", "sequence", "heads", None)


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x4")
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--devices", type=int, nargs="+", default=(2, 4, 8, 16), help="that share a sequence")
    args = parser.parse_args(argv)

    for context in args.devices:
        mesh = make_mesh(MeshConfig(data=-1, context=context), find_target(args.topology).devices)
        for name, attention in (("all-to-all", _all_to_all), ("keys and values", _gathered)):
            compiled = compile_attention(attention, mesh, args.length)
            exchanges = collectives(parse(compiled.as_text()), mesh.size)
            sent, needed = sum(each.bytes for each in exchanges), compiled.memory_analysis().temp_size_in_bytes
            print(f"{context:3} devices  {name:16} sends {sent / 2**20:7.0f} MiB, needs {needed / 2**20:7.0f} MiB")


def compile_attention(attention: Callable[..., Array], mesh: Mesh, length: int) -> Any:
    """Compiles attention of one sequence per row of the mesh, forward and backward."""
    config, rows = presets.ouro_1_4b(), mesh.shape["data"]
    spread = NamedSharding(mesh, logical_to_spec(*_RUN_OF_ALL_HEADS))
    shape = (rows, length, config.num_heads, config.head_width)
    states = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=spread)
    places = jax.ShapeDtypeStruct(
        (rows, length), jnp.int32, sharding=NamedSharding(mesh, logical_to_spec("batch", None))
    )

    def forward_and_backward(queries: Array, keys: Array, values: Array, places: Array, gradient: Array) -> object:
        mixed, backward = jax.vjp(lambda *states: attention(*states, places), queries, keys, values)
        return mixed, backward(gradient)

    with use_mesh(mesh), without_network():
        traced = jax.jit(forward_and_backward).trace(states, states, states, places, states)
        return traced.lower(lowering_platforms=("tpu",)).compile()


def _all_to_all(queries: Array, keys: Array, values: Array, places: Array) -> Array:
    """Trades positions for heads around the attention, as the library does."""
    return self_attention(AttentionKernel.SPLASH, queries, keys, values, places, places)


def _gathered(queries: Array, keys: Array, values: Array, places: Array) -> Array:
    """Computes each device's own queries against all keys and values, which it gathers."""

    def local(queries: Array, keys: Array, values: Array, segments: Array) -> Array:
        keys, values = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (keys, values))
        run, length, block = queries.shape[1], keys.shape[1], min(1024, queries.shape[1])

        sizes = kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=512,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=512,
            block_q_dq=block,
            block_kv_dq=block,
        )

        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([masks.FullMask((run, length))] * queries.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
        )

        # [B, S, H, Dh] -> [B, H, S, Dh], as the kernel expects.
        own = jax.lax.dynamic_slice_in_dim(segments, jax.lax.axis_index("context") * run, run, axis=1)
        by_head = (x.swapaxes(1, 2) for x in (queries, keys, values))
        return jax.vmap(kernel)(*by_head, kernels.SegmentIds(own, segments)).swapaxes(1, 2)

    heads = logical_to_spec(*_RUN_OF_ALL_HEADS)
    specs = heads, heads, heads, logical_to_spec("batch", None)
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(queries, keys, values, places)


if __name__ == "__main__":
    main()
