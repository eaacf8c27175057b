"""Causal self-attention within documents, by XLA, a TPU's splash kernel or a GPU's cuDNN: one function, one meaning."""

from looplm_jax.models.attention_kernels.choice import choose_kernel
from looplm_jax.models.attention_kernels.self_attention import self_attention

__all__ = ["choose_kernel", "self_attention"]
