"""Flash attention on a GPU, for long sequences, by the Pallas kernel for Triton that comes with JAX.

It compares document ids tile by tile, so nothing is [S, S], and an interpreter runs it on a CPU, where the tests
compare values and gradients with plain attention. cuDNN's packed layout would need Hopper, a bound on the documents of
a sequence that the compiler knows, and softmax statistics of [B * bound, H, S].
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.sharding import target_platform

_WIDEST = 128  # head whose tiles fit the fast memory of an A100
_TILE = 128  # queries of the largest tile, which has to divide the length

# As compiled for an H200 with heads of 128: a program needs 105 KiB of fast memory forward and 96 KiB backward, and
# next to no register is spilled. Tiles of 128 backward spill ten times as much.
_BLOCKS = kernels.BlockSizes(
    block_q=_TILE, block_k=64, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64
)  # fmt: skip


def fits(length: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether the kernel can take such sequences, in a backward pass too."""
    return dtype == jnp.bfloat16 and length % _TILE == 0 and head_width % 8 == 0 and head_width <= _WIDEST


def check(length: int, head_width: int, dtype: DTypeLike) -> None:
    """Refuse what the kernel cannot take. Raises UserError."""
    if not fits(length, head_width, dtype):
        raise UserError(
            f"compute.attention=triton needs bfloat16, a multiple of {_TILE} tokens and heads of a multiple of 8 up to "
            f"{_WIDEST}, not {jnp.dtype(dtype).name}, {length} tokens and heads of {head_width}; "
            "set compute.attention=auto"
        )


def triton_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Softmax attention to the keys of the own document up to the own column: positions grow along each document."""
    del positions
    num_heads, head_width = queries.shape[2:]
    keys, values = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (keys, values))
    return kernels.mha(
        queries,
        keys,
        values,
        segment_ids,
        sm_scale=head_width**-0.5,
        causal=True,
        block_sizes=_BLOCKS,
        interpret=target_platform() != "gpu",
    )
