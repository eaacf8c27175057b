"""Flash attention on GPU for long sequences, by the Pallas Triton kernel of JAX.

The kernel compares document ids tile by tile, so no array is [S, S]. It can be interpreted on a CPU, where the tests
compare its values and gradients with plain attention. cuDNN's packed layout would need Hopper, a static bound on the
number of documents per sequence, and softmax statistics of [B * bound, H, S].
"""

import warnings
from types import ModuleType

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.sharding import target_platform

_WIDEST = 128  # the head width for which these tiles were compiled
_LARGEST = 64  # queries or keys of the largest tile, which must divide the length

# Compiled for an H200 and for compute capability 8.6 with heads of 128, no kernel uses more than 81 KiB of shared
# memory, which every GPU with bfloat16 has. If all tiles were 64 x 64, the backward kernel would use 105 KiB.
_TILES = {"block_q": 64, "block_k": 64, "block_q_dkv": 32, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 32}


def fits(length: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether the kernel supports such sequences, including the backward pass."""
    return dtype == jnp.bfloat16 and length % _LARGEST == 0 and head_width % 8 == 0 and head_width <= _WIDEST


def check(length: int, head_width: int, dtype: DTypeLike) -> None:
    """Raises UserError if the kernel does not support such sequences."""
    if not fits(length, head_width, dtype):
        raise UserError(
            f"compute.attention=triton needs bfloat16, a multiple of {_LARGEST} tokens and heads of a multiple of 8 "
            f"up to {_WIDEST}, not {jnp.dtype(dtype).name}, {length} tokens and heads of {head_width}; "
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
    kernels = _kernels()

    num_heads, head_width = queries.shape[2:]
    keys, values = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (keys, values))

    return kernels.mha(
        queries,
        keys,
        values,
        segment_ids,
        sm_scale=head_width**-0.5,
        causal=True,
        block_sizes=kernels.BlockSizes(**_TILES),
        interpret=target_platform() != "gpu",
    )


def _kernels() -> ModuleType:
    """Returns the module of the kernel, imported without its deprecation warning."""
    with warnings.catch_warnings():
        # JAX 0.11 recommends tokamax instead, which has many dependencies and pins the version of one.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention
    return attention
