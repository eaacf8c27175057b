"""Causal self-attention within documents: one function, computed by XLA, splash on TPU, or cuDNN or Triton on GPU.

`choose_kernel` selects the kernel by the platform that the program will run on and by the shapes. `self_attention`
computes it on a mesh: each device for its sequences and heads, over whole sequences.

Splash: scores stay in the TPU's fast memory, and blocks above the diagonal are skipped. On other platforms the kernel
is interpreted, slowly, for tests.

cuDNN: its public interface has no documents. That tokens see only their own document is a bias [B, 1, S, S], and cuDNN
writes a gradient of the same size. Long sequences are therefore left to Triton.

Triton: the Pallas kernel of JAX compares document ids tile by tile, so no array is [S, S]. It can be interpreted on a
CPU, where the tests compare its values and gradients with plain attention. cuDNN's packed layout would need Hopper, a
static bound on the number of documents per sequence, and softmax statistics of [B * bound, H, S].
"""

import functools
import math
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from etils import epy
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from looplm_jax.config import AttentionKernel, ComputeConfig
from looplm_jax.errors import UserError
from looplm_jax.models._attention import attend, visible
from looplm_jax.sharding import (
    all_to_all_heads,
    all_to_all_positions,
    is_divisible,
    logical_to_spec,
    sequence_shards,
    target_kind,
    target_platform,
)

with epy.lazy_imports():  # Pallas takes long to import, and only TPUs need these kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

# XLA


_CHUNK = 512  # queries whose scores exist simultaneously
_NOWHERE = -1  # the document of padding, which matches no key


def xla_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Computes softmax attention to the keys of the same document up to the query's position.

    The backward pass recomputes the scores of each chunk.
    """
    length = queries.shape[1]
    size = min(_CHUNK, length)
    count = -(-length // size)

    def split(x: Array, padding: int = 0) -> Array:  # [B, S, ...] -> [count, B, size, ...]
        widths = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, widths, constant_values=padding)
        return jnp.moveaxis(padded.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def one_chunk(chunk: tuple[Array, Array, Array]) -> Array:
        own_queries, own_positions, own_segments = chunk
        mask = visible(own_positions, own_segments, positions, segment_ids)
        return attend(own_queries, (keys,), (values,), (mask,))

    mixed = jax.lax.map(one_chunk, (split(queries), split(positions), split(segment_ids, _NOWHERE)))
    whole = jnp.moveaxis(mixed, 0, 1).reshape(queries.shape[0], count * size, *queries.shape[2:])
    return whole[:, :length]


# Splash, on TPU


OUTPUT = "attention_output"  # name of the saved output and its softmax statistics
_LANES = 128  # lanes of a vector register; a block of keys is a multiple

# Block sizes of queries and keys by generation. Each block has a fixed cost in addition to its 4 * block^2 * Dh
# operations, and keys and values are read once per block of queries, so fast chips need large blocks. Larger blocks do
# more work above the diagonal, and 2048 exceeds the fast memory that a kernel may use on v5e and v5p, and on v6e with
# 64K tokens.
_BLOCKS = {"TPU v5 lite": 1024, "TPU v5": 1024, "TPU v5p": 1024, "TPU v6 lite": 1024}
_BLOCK_ELSEWHERE = 512
_KEYS_AT_A_TIME = 512  # keys of a block whose scores exist simultaneously


def splash_fits(length: int) -> bool:
    """Whether the kernel supports sequences of this length."""
    return length % _LANES == 0


def check_splash(length: int) -> None:
    """Raises UserError if the kernel does not support sequences of this length."""
    if not splash_fits(length):
        raise UserError(
            f"compute.attention=splash needs sequences of a multiple of {_LANES} tokens, not {length}; "
            "change the length or set compute.attention=auto"
        )


def splash_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Computes softmax attention to the keys of the same document up to the query's column.

    Columns replace positions, because positions increase within each document.
    """
    del positions
    length, num_heads, head_width = queries.shape[1:]

    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads),
        block_sizes=kernels.BlockSizes(**_block_sizes(length)),
        head_shards=1,
        q_seq_shards=1,
        interpret=target_platform() != "tpu",
        residual_checkpoint_name=OUTPUT,
    )

    def one_row(q: Array, k: Array, v: Array, segments: Array) -> Array:  # [H, S, Dh]
        return kernel(q, k, v, kernels.SegmentIds(segments, segments))

    q, k, v = (x.swapaxes(1, 2) for x in (queries * head_width**-0.5, keys, values))
    return jax.vmap(one_row)(q, k, v, segment_ids).swapaxes(1, 2)


def _block_sizes(length: int) -> dict[str, Any]:
    """Returns block sizes that divide `length`, by their names in the kernel."""
    block = _BLOCKS.get(target_kind(), _BLOCK_ELSEWHERE)
    while length % block:
        block //= 2

    block_kv_compute = min(block, _KEYS_AT_A_TIME)
    return {
        "block_q": block,
        "block_kv": block,
        "block_kv_compute": block_kv_compute,
        "block_q_dkv": block,
        "block_kv_dkv": block,
        "block_kv_dkv_compute": block_kv_compute,
        "block_q_dq": block,
        "block_kv_dq": block,
    }


# cuDNN, on GPU


_CUDNN_WIDEST = 128  # largest head width on every GPU that cuDNN supports; Hopper supports 256
_CUDNN_LIMIT = 8192  # tokens; from here on, each sequence has 128 MiB of bias, and as much of its gradient


def cudnn_fits(length: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether cuDNN supports such sequences, including the backward pass."""
    return (
        dtype == jnp.bfloat16
        and length % 2 == 0
        and length < _CUDNN_LIMIT
        and head_width % 8 == 0
        and head_width <= _CUDNN_WIDEST
    )


def check_cudnn(length: int, head_width: int, dtype: DTypeLike) -> None:
    """Raises UserError if cuDNN does not support such sequences."""
    if not cudnn_fits(length, head_width, dtype):
        raise UserError(
            f"compute.attention=cudnn needs bfloat16, an even number of tokens below {_CUDNN_LIMIT} and heads of "
            f"a multiple of 8 up to {_CUDNN_WIDEST}, not {jnp.dtype(dtype).name}, {length} tokens and heads of "
            f"{head_width}; set compute.attention=auto"
        )


def cudnn_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Computes softmax attention to the keys of the same document up to the query's column.

    Columns replace positions, because positions increase within each document.
    """
    del positions
    same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]

    return jax.nn.dot_product_attention(
        queries, keys, values, mask=same_document, is_causal=True, implementation="cudnn"
    )


# Triton, on GPU


_TRITON_WIDEST = 128  # the head width for which these tiles were compiled
_TRITON_TILE = 64  # queries or keys of the largest tile, which must divide the length

# Compiled for an H200 and for compute capability 8.6 with heads of 128, no kernel uses more than 81 KiB of shared
# memory, which every GPU with bfloat16 has. If all tiles were 64 x 64, the backward kernel would use 105 KiB.
_TILES = {"block_q": 64, "block_k": 64, "block_q_dkv": 32, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 32}


def triton_fits(length: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether the kernel supports such sequences, including the backward pass."""
    return dtype == jnp.bfloat16 and length % _TRITON_TILE == 0 and head_width % 8 == 0 and head_width <= _TRITON_WIDEST


def check_triton(length: int, head_width: int, dtype: DTypeLike) -> None:
    """Raises UserError if the kernel does not support such sequences."""
    if not triton_fits(length, head_width, dtype):
        raise UserError(
            f"compute.attention=triton needs bfloat16, a multiple of {_TRITON_TILE} tokens and heads of a multiple of "
            f"8 up to {_TRITON_WIDEST}, not {jnp.dtype(dtype).name}, {length} tokens and heads of {head_width}; "
            "set compute.attention=auto"
        )


def triton_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Computes softmax attention to the keys of the same document up to the query's column.

    Columns replace positions, because positions increase within each document.
    """
    del positions
    triton_kernels = _import_triton_kernels()

    num_heads, head_width = queries.shape[2:]
    keys, values = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (keys, values))

    return triton_kernels.mha(
        queries,
        keys,
        values,
        segment_ids,
        sm_scale=head_width**-0.5,
        causal=True,
        block_sizes=triton_kernels.BlockSizes(**_TILES),
        interpret=target_platform() != "gpu",
    )


def _import_triton_kernels() -> ModuleType:
    """Returns the module of the kernel, imported without its deprecation warning."""
    with warnings.catch_warnings():
        # JAX 0.11 recommends tokamax instead, which has many dependencies and pins the version of one.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention
    return attention


# Choice of the kernel


_SHORT = 2048  # tokens; up to this length a mask [B, S, S], computed once for all layers, is cheapest
_CHECKS_ON_GPU = {AttentionKernel.CUDNN: check_cudnn, AttentionKernel.TRITON: check_triton}


def choose_kernel(compute: ComputeConfig, *, length: int, head_width: int, dtype: DTypeLike) -> AttentionKernel | None:
    """Returns the kernel for sequences of `length` tokens, never `auto`, or None to use the masks of a `Context`.

    Raises:
      UserError: the kernel that `compute` names does not support these shapes or this platform.
    """
    kernel = compute.attention
    if kernel is AttentionKernel.AUTO:
        kernel = _automatic(length, head_width, dtype)
    elif kernel is AttentionKernel.SPLASH:
        check_splash(length)
    elif kernel in _CHECKS_ON_GPU:
        if target_platform() != "gpu":
            raise UserError(f"compute.attention={kernel.value} needs a GPU; set compute.attention=auto")
        _CHECKS_ON_GPU[kernel](length, head_width, dtype)

    whole = sequence_shards() == 1 or length % sequence_shards() != 0
    return None if kernel is AttentionKernel.XLA and whole and length <= _SHORT else kernel


def _automatic(length: int, head_width: int, dtype: DTypeLike) -> AttentionKernel:
    """Returns the kernel that `auto` selects for these shapes on the target platform."""
    # XLA cannot shard a Pallas kernel by itself: it needs a mesh for `shard_map`, or a single device.
    shardable = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1

    platform = target_platform()
    if platform == "tpu" and splash_fits(length) and shardable:
        return AttentionKernel.SPLASH
    if platform == "gpu" and cudnn_fits(length, head_width, dtype):
        return AttentionKernel.CUDNN
    if platform == "gpu" and triton_fits(length, head_width, dtype) and shardable:
        return AttentionKernel.TRITON
    return AttentionKernel.XLA


# Attention on a mesh


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
