"""Self-attention on a mesh: each device computes it for its sequences and heads, over whole sequences."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from looplm_jax.config import AttentionKernel
from looplm_jax.models.attention_kernels.cudnn import cudnn_attention
from looplm_jax.models.attention_kernels.splash import OUTPUT, splash_attention
from looplm_jax.models.attention_kernels.triton import triton_attention
from looplm_jax.models.attention_kernels.xla import xla_attention
from looplm_jax.sharding import all_to_all_heads, all_to_all_positions, is_divisible, logical_to_spec, sequence_shards


def _named(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """Returns the kernel with its output named for rematerialization policies.

    Splash names its output itself, together with the softmax statistics.
    """
    return lambda *arrays: checkpoint_name(kernel(*arrays), OUTPUT)


_KERNELS = {
    AttentionKernel.XLA: _named(xla_attention),
    AttentionKernel.SPLASH: splash_attention,
    AttentionKernel.CUDNN: _named(cudnn_attention),
    AttentionKernel.TRITON: _named(triton_attention),
}


def self_attention(
    kernel: AttentionKernel,
    queries: Float[Array, "B s H Dh"],
    keys: Float[Array, "B s K Dh"],
    values: Float[Array, "B s K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B s H Dh"]:
    """Computes grouped-query softmax attention of each token to its own document, up to its own position.

    In a local region, queries, keys and values are those of one device: `s` of the `S` positions of each sequence.
    Scores are scaled by `Dh ** -0.5`, and their softmax is in float32. Documents must be contiguous, and positions
    increase within each.
    """
    arrays = queries, keys, values, positions, segment_ids
    mesh, heads = jax.sharding.get_abstract_mesh(), logical_to_spec("batch", "sequence", "heads", None)

    if kernel is AttentionKernel.XLA and sequence_shards() == 1:
        return _KERNELS[kernel](*arrays)  # the compiler shards it over the mesh
    if mesh.empty:
        return _KERNELS[kernel](*arrays)
    # Without an even division the compiler has to shard plain XLA attention.
    if not is_divisible(queries.shape, heads):
        return _KERNELS[AttentionKernel.XLA](*arrays)

    kv_heads, rows = logical_to_spec("batch", "sequence", "kv_heads", None), logical_to_spec("batch", None)
    mapped = jax.shard_map(
        functools.partial(_on_whole_sequences, _KERNELS[kernel]),
        in_specs=(heads, kv_heads, kv_heads, rows, rows),
        out_specs=heads,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,  # Pallas kernels do not declare along which axes their results vary
    )

    return mapped(*arrays)


def _on_whole_sequences(
    kernel: Callable[..., Array],
    queries: Float[Array, "B s H Dh"],
    keys: Float[Array, "B s K Dh"],
    values: Float[Array, "B s K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B s H Dh"]:
    """Computes attention on one device, with an all-to-all from positions to heads before it and back after it."""
    shards = sequence_shards()
    if shards == 1:
        return kernel(queries, keys, values, positions, segment_ids)
    copies = shards // math.gcd(shards, keys.shape[2])  # with fewer key heads than devices, heads are repeated
    keys, values = (jnp.repeat(x, copies, axis=2) for x in (keys, values))

    queries, keys, values = (all_to_all_heads(x) for x in (queries, keys, values))
    return all_to_all_positions(kernel(queries, keys, values, positions, segment_ids))
