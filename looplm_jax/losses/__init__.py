"""Losses of the training stages, as pure functions on arrays.

`stage1` is the expected loss over exits (Eq. 4) and `stage2` the adaptive loss of the exit gate (Eq. 5 and 6).
`token_losses`, `token_scores` and `weighted_token_losses` compute the cross-entropy of every token at every loop in
chunks.
"""

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
