"""Model configurations by name: the released Ouro models, small ones for laptops and tests, and relatives of Ouro."""

import dataclasses
import math

from looplm_jax.config import (
    GatePlacement,
    Initializer,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    StateNorm,
    TimeSignal,
)


def ouro_1_4b() -> ModelConfig:
    """Returns Ouro-1.4B: 1,434,652,673 parameters (paper, Table 2)."""
    return ModelConfig(vocab_size=49152, width=2048, mlp_width=5632, num_layers=24, num_heads=16)


def ouro_2_6b() -> ModelConfig:
    """Returns Ouro-2.6B: 2,667,974,657 parameters (paper, Table 2)."""
    return ModelConfig(vocab_size=49152, width=2048, mlp_width=5632, num_layers=48, num_heads=16)


def small(vocab_size: int = 8192) -> ModelConfig:
    """Returns a model for a laptop: width 256, four layers."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=256,
        mlp_width=704,
        num_layers=4,
        num_heads=4,
        rope_theta=1e4,
        max_positions=4096,
    )


def tiny(vocab_size: int = 97) -> ModelConfig:
    """Returns a model for tests: grouped-query attention, width 32, two layers."""
    return ModelConfig(
        vocab_size=vocab_size,
        width=32,
        mlp_width=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        rope_theta=1e4,
        max_positions=128,
    )


# Relatives of Ouro


def huginn_0125() -> ModelConfig:
    """Returns Huginn-0125: 3,564,976,800 parameters (arXiv 2502.05171)."""
    return huginn(
        vocab_size=65536,
        width=5280,
        mlp_width=17920,
        num_heads=55,
        num_layers=4,
        prelude_layers=2,
        coda_layers=2,
        loops=32,
        max_positions=4096,
    )


def huginn(
    *,
    vocab_size: int,
    width: int,
    mlp_width: int,
    num_heads: int,
    num_layers: int,
    prelude_layers: int,
    coda_layers: int,
    loops: int,
    max_positions: int,
) -> ModelConfig:
    """Returns a model with the block of Huginn: norms of the sum, an adapter as injection, a tied and scaled embedding.

    It has no exit gate, so it is trained with `objective: last_loss`.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        num_heads=num_heads,
        num_layers=num_layers,
        prelude_layers=prelude_layers,
        coda_layers=coda_layers,
        loops=loops,
        max_positions=max_positions,
        injection=Injection.LINEAR,
        initial_state=InitialState.NOISE,
        state_std=math.sqrt(2 / 5),
        state_norm=StateNorm.READOUT,
        shared_readout_norm=True,
        gate=GatePlacement.NONE,
        rope_theta=5e4,
        norm_placement=NormPlacement.OUTER,
        qk_bias=True,
        tied_head=True,
        embedding_scale=math.sqrt(width),  # as in the Transformer (arXiv 1706.03762)
        initializer=Initializer.SCALED_BY_DEPTH,
        init_std=math.sqrt(2 / (5 * width)),  # arXiv 1910.05895
    )


def universal_transformer(vocab_size: int = 8192) -> ModelConfig:
    """Returns a small decoder with the block of the Universal Transformer (arXiv 1807.03819), and its halting gate.

    Its feed-forward layer is SwiGLU, not one ReLU layer.
    """
    return dataclasses.replace(
        small(vocab_size),
        num_layers=1,
        norm_placement=NormPlacement.POST,
        state_norm=StateNorm.READOUT,
        time_signal=TimeSignal.SINUSOID,
        position_signal=PositionSignal.SINUSOID,
        gate=GatePlacement.BEFORE,
    )


def deq(vocab_size: int = 8192) -> ModelConfig:
    """Returns a small model whose loop has a fixed point at its initial weights (arXiv 1909.01377).

    It is Ouro's block with the normalized input added in every loop.
    """
    return dataclasses.replace(small(vocab_size), num_layers=1, injection=Injection.ADD, injection_norm=True)


def loopformer(vocab_size: int = 8192) -> ModelConfig:
    """Returns a small model with the modulation of LoopFormer (arXiv 2602.11451).

    Its norms have weights, its feed-forward layer is SwiGLU, and it has rotary positions.
    """
    return dataclasses.replace(
        small(vocab_size),
        num_layers=3,
        loops=8,
        norm_placement=NormPlacement.PRE,
        state_norm=StateNorm.READOUT,
        time_signal=TimeSignal.MODULATION,
    )


def parcae(vocab_size: int = 8192) -> ModelConfig:
    """Returns a small model with the injection of Parcae (arXiv 2604.12946), without its matrix before the coda."""
    base = small(vocab_size)
    return dataclasses.replace(
        base,
        num_layers=2,
        loops=8,
        prelude_layers=1,
        coda_layers=1,
        injection=Injection.DIAGONAL,
        injection_norm=True,
        initial_state=InitialState.NOISE,
        state_std=math.sqrt(2 / (5 * base.width)),
        state_norm=StateNorm.READOUT,
        norm_placement=NormPlacement.PRE,
    )
