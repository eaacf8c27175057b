"""Flash attention by cuDNN on a GPU.

Its public call knows no documents: that tokens of one document see no other is a bias, [B, 1, S, S], and cuDNN writes a
gradient of the same size. Long sequences are left to `triton`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from looplm_jax.errors import UserError

_WIDEST = 128  # head that cuDNN takes on every GPU it supports; Hopper takes 256
_TOO_LONG = 8192  # tokens from which on each sequence has 128 MiB of bias, and as much of its gradient


def fits(length: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether cuDNN can take such sequences, in a backward pass too."""
    return (
        dtype == jnp.bfloat16
        and length % 2 == 0
        and length < _TOO_LONG
        and head_width % 8 == 0
        and head_width <= _WIDEST
    )


def check(length: int, head_width: int, dtype: DTypeLike) -> None:
    """Refuse what cuDNN cannot take. Raises UserError."""
    if not fits(length, head_width, dtype):
        raise UserError(
            f"compute.attention=cudnn needs bfloat16, an even number of tokens below {_TOO_LONG} and heads of a "
            f"multiple of 8 up to {_WIDEST}, not {jnp.dtype(dtype).name}, {length} tokens and heads of {head_width}; "
            "set compute.attention=auto"
        )


def cudnn_attention(
    queries: Float[Array, "B S H Dh"],
    keys: Float[Array, "B S K Dh"],
    values: Float[Array, "B S K Dh"],
    positions: Int[Array, "B S"],
    segment_ids: Int[Array, "B S"],
) -> Float[Array, "B S H Dh"]:
    """Softmax attention to the keys of the own document up to the own column: positions grow along each document."""
    del positions
    same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        queries, keys, values, mask=same_document, is_causal=True, implementation="cudnn"
    )
