"""Selects the attention kernel by the platform that the program will run on and by the shapes."""

import jax
from jax.typing import DTypeLike

from looplm_jax.config import AttentionKernel, ComputeConfig
from looplm_jax.errors import UserError
from looplm_jax.models.attention_kernels import cudnn, splash, triton
from looplm_jax.sharding import sequence_shards, target_platform

_SHORT = 2048  # tokens; up to this length a mask [B, S, S], computed once for all layers, is cheapest
_ON_GPU = {AttentionKernel.CUDNN: cudnn, AttentionKernel.TRITON: triton}


def choose_kernel(compute: ComputeConfig, *, length: int, head_width: int, dtype: DTypeLike) -> AttentionKernel | None:
    """Returns the kernel for sequences of `length` tokens, never `auto`, or None to use the masks of a `Context`.

    Raises:
      UserError: the kernel that `compute` names does not support these shapes or this platform.
    """
    kernel = compute.attention
    if kernel is AttentionKernel.AUTO:
        kernel = _automatic(length, head_width, dtype)
    elif kernel is AttentionKernel.SPLASH:
        splash.check(length)
    elif kernel in _ON_GPU:
        if target_platform() != "gpu":
            raise UserError(f"compute.attention={kernel.value} needs a GPU; set compute.attention=auto")
        _ON_GPU[kernel].check(length, head_width, dtype)

    whole = sequence_shards() == 1 or length % sequence_shards() != 0
    return None if kernel is AttentionKernel.XLA and whole and length <= _SHORT else kernel


def _automatic(length: int, head_width: int, dtype: DTypeLike) -> AttentionKernel:
    """Returns the kernel that `auto` selects for these shapes on the target platform."""
    # XLA cannot shard a Pallas kernel by itself: it needs a mesh for `shard_map`, or a single device.
    cut = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1

    platform = target_platform()
    if platform == "tpu" and splash.fits(length) and cut:
        return AttentionKernel.SPLASH
    if platform == "gpu" and cudnn.fits(length, head_width, dtype):
        return AttentionKernel.CUDNN
    if platform == "gpu" and triton.fits(length, head_width, dtype) and cut:
        return AttentionKernel.TRITON
    return AttentionKernel.XLA
