"""Losses of the training stages, as pure functions on arrays that work with any looped model.

`stage1` is the expected loss over exits with an entropy term (Eq. 4); `stage2` trains the exit gate alone (Eq. 5, 6).

    >>> import jax
    >>> from looplm_jax.losses import stage1_from_hidden
    >>> hidden = jax.random.normal(jax.random.key(0), (4, 2, 8, 16))  # [T, B, S, D]: four loops
    >>> head = jax.random.normal(jax.random.key(1), (16, 32))  # [D, V]
    >>> targets = jax.numpy.zeros((2, 8), int)  # [B, S]
    >>> loss, metrics = stage1_from_hidden(hidden, head, targets, gate_logits=hidden[..., 0], beta=0.05)
    >>> metrics.loss_per_loop.shape
    (4,)

Losses of a stage: `stage1` takes the cross-entropy of every token at every loop, `stage1_from_hidden` computes it on
the way and needs less memory and time, `stage2` takes it as a constant. Each returns the loss and its metrics,
`Stage1Metrics` or `Stage2Metrics`.

Cross-entropy of every token at every loop, in chunks, so that the logits of all loops never exist at once:
`token_losses` for training, `token_scores` (loss and correctness) for evaluation, and `weighted_token_losses` for a
weighted sum whose gradients are computed in the forward pass.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Cross-entropy of every token at every loop.
    from looplm_jax.losses._cross_entropy import token_losses, token_scores, weighted_token_losses

    # Losses of the stages.
    from looplm_jax.losses._stage1 import Stage1Metrics, stage1, stage1_from_hidden
    from looplm_jax.losses._stage2 import Stage2Metrics, stage2

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
