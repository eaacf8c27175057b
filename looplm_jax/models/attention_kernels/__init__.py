"""Causal self-attention within documents: one function, computed by XLA, splash on TPU, or cuDNN or Triton on GPU."""

from looplm_jax.models.attention_kernels.choice import choose_kernel
from looplm_jax.models.attention_kernels.self_attention import self_attention
from looplm_jax.models.attention_kernels.splash import OUTPUT

__all__ = ["OUTPUT", "choose_kernel", "self_attention"]
