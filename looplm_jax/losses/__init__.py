"""Losses as pure functions on arrays, each under the number of its equation."""

from looplm_jax.losses.cross_entropy import token_losses, token_scores, weighted_token_losses
from looplm_jax.losses.stage1 import Stage1Metrics, stage1, stage1_from_hidden
from looplm_jax.losses.stage2 import Stage2Metrics, stage2

__all__ = [
    "Stage1Metrics",
    "Stage2Metrics",
    "stage1",
    "stage1_from_hidden",
    "stage2",
    "token_losses",
    "token_scores",
    "weighted_token_losses",
]
