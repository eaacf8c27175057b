"""Flash attention by cuDNN on GPU.

Its public interface has no documents. That tokens see only their own document is a bias [B, 1, S, S], and cuDNN writes
a gradient of the same size. Long sequences are therefore left to `triton`.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from looplm_jax.errors import UserError

_WIDEST = 128  # largest head width on every GPU that cuDNN supports; Hopper supports 256
_TOO_LONG = 8192  # tokens; from this length on each sequence has 128 MiB of bias, and as much of its gradient


def fits(length: int, head_width: int, dtype: DTypeLike) -> bool:
    """Whether cuDNN supports such sequences, including the backward pass."""
    return (
        dtype == jnp.bfloat16
        and length % 2 == 0
        and length < _TOO_LONG
        and head_width % 8 == 0
        and head_width <= _WIDEST
    )


def check(length: int, head_width: int, dtype: DTypeLike) -> None:
    """Raises UserError if cuDNN does not support such sequences."""
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
    """Computes softmax attention to the keys of the same document up to the query's column.

    Columns replace positions, because positions increase within each document.
    """
    del positions
    same_document = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]

    return jax.nn.dot_product_attention(
        queries, keys, values, mask=same_document, is_causal=True, implementation="cudnn"
    )
