"""Model configurations by name: the released Ouro models, and small ones for laptops and tests."""

from looplm_jax.config import ModelConfig


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
