"""Splash attention on TPU. Scores stay in the chip's fast memory, and blocks above the diagonal are skipped.

On other platforms the kernel is interpreted, slowly, for tests.
"""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.sharding import target_kind, target_platform

OUTPUT = "attention_output"  # name of the saved output and its softmax statistics
_LANES = 128  # lanes of a vector register; a block of keys is a multiple

# Block sizes of queries and keys by generation. Each block has a fixed cost in addition to its 4 * block^2 * Dh
# operations, and keys and values are read once per block of queries, so fast chips need large blocks. Larger blocks do
# more work above the diagonal, and 2048 exceeds the fast memory that a kernel may use on v5e and v5p, and on v6e with
# 64K tokens.
_BLOCKS = {"TPU v5 lite": 1024, "TPU v5": 1024, "TPU v5p": 1024, "TPU v6 lite": 1024}
_BLOCK_ELSEWHERE = 512
_KEYS_AT_A_TIME = 512  # keys of a block whose scores exist simultaneously


def fits(length: int) -> bool:
    """Whether the kernel supports sequences of this length."""
    return length % _LANES == 0


def check(length: int) -> None:
    """Raises UserError if the kernel does not support sequences of this length."""
    if not fits(length):
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
        block_sizes=_block_sizes(length),
        head_shards=1,
        q_seq_shards=1,
        interpret=target_platform() != "tpu",
        residual_checkpoint_name=OUTPUT,
    )

    def one_row(q: Array, k: Array, v: Array, segments: Array) -> Array:  # [H, S, Dh]
        return kernel(q, k, v, kernels.SegmentIds(segments, segments))

    q, k, v = (x.swapaxes(1, 2) for x in (queries * head_width**-0.5, keys, values))
    return jax.vmap(one_row)(q, k, v, segment_ids).swapaxes(1, 2)


def _block_sizes(length: int) -> kernels.BlockSizes:
    """Returns block sizes that divide `length`."""
    block = _BLOCKS.get(target_kind(), _BLOCK_ELSEWHERE)
    while length % block:
        block //= 2

    part = min(block, _KEYS_AT_A_TIME)
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=part,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=part,
        block_q_dq=block,
        block_kv_dq=block,
    )
