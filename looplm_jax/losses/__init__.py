"""Losses of the training stages, as pure functions on arrays that work with any looped model.

`stage1` is the expected loss over exits with an entropy term (Eq. 4); `stage2` trains the exit gate alone (Eq. 5, 6).
`looprpt`, `rltt` and `policy_gradient` are those of reinforcement learning.

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

Reinforcement learning on given text: `looprpt`, of `TeacherScores` and `NoisyRollouts`, with `LoopRPTMetrics`; its
`hard_tokens`; and `updated_teacher` after a step.

Reinforcement learning on answers: `policy_gradient` of the tokens that were generated, and of their exits if these were
drawn; `rltt` of all loops, with `loop_weights`. Advantages come from `group_advantages`, the divergence from `k3`, and
`aggregate` turns terms of tokens into a loss. Their metrics are `PolicyGradientMetrics` and `RLTTMetrics`.

    >>> from looplm_jax.losses import group_advantages, policy_gradient
    >>> rewards = jax.numpy.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])  # [P, G]: two prompts, four answers
    >>> advantages = group_advantages(rewards)
    >>> print(advantages)
    [[ 0.866... -0.866... -0.866... 0.866...]
     [ 0. 0. 0. 0. ]]
    >>> log_probs = jax.numpy.full((8, 5), -1.0)  # [R, N]: eight rows of five tokens
    >>> mask = jax.numpy.ones((8, 5))
    >>> loss, metrics = policy_gradient(log_probs, advantages.reshape(-1), mask, max_new_tokens=5)
    >>> float(metrics.clipped)
    0.0

Cross-entropy of every token at every loop, in chunks, so that the logits of all loops never exist at once:
`token_losses` for training, `token_scores` (loss and correctness) for evaluation, and `weighted_token_losses` for a
weighted sum whose gradients are computed in the forward pass. `token_entropies` are those of whole predictions.

Stability of a loop, any function of a state: `jacobian_penalty` is small for loops that contract, and `spectral_radius`
measures by how much they do.

    >>> from looplm_jax.losses import jacobian_penalty, spectral_radius
    >>> z, v = hidden[-1], jax.random.normal(jax.random.key(2), (2, 8, 16))
    >>> print(jacobian_penalty(lambda z: 0.5 * z, z, v))  # about the mean squared entry of a row, 0.25
    0.2...
    >>> print(jax.numpy.round(spectral_radius(lambda z: 0.5 * z, z, v), 3))  # one value per row
    [0.5 0.5]
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Cross-entropy of every token at every loop.
    from looplm_jax.losses._cross_entropy import token_entropies, token_losses, token_scores, weighted_token_losses

    # The size of the Jacobian of a loop.
    from looplm_jax.losses._jacobian import jacobian_penalty, spectral_radius

    # Reinforcement learning on given text.
    from looplm_jax.losses._looprpt import (
        LoopRPTMetrics,
        NoisyRollouts,
        TeacherScores,
        hard_tokens,
        looprpt,
        updated_teacher,
    )

    # Reinforcement learning on answers.
    from looplm_jax.losses._policy_gradient import (
        PolicyGradientMetrics,
        RLTTMetrics,
        aggregate,
        group_advantages,
        k3,
        loop_weights,
        policy_gradient,
        rltt,
    )

    # Losses of the stages.
    from looplm_jax.losses._stage1 import Stage1Metrics, stage1, stage1_from_hidden
    from looplm_jax.losses._stage2 import Stage2Metrics, stage2

__all__ = [
    "LoopRPTMetrics",
    "NoisyRollouts",
    "PolicyGradientMetrics",
    "RLTTMetrics",
    "Stage1Metrics",
    "Stage2Metrics",
    "TeacherScores",
    "aggregate",
    "group_advantages",
    "hard_tokens",
    "jacobian_penalty",
    "k3",
    "loop_weights",
    "looprpt",
    "policy_gradient",
    "rltt",
    "spectral_radius",
    "stage1",
    "stage1_from_hidden",
    "stage2",
    "token_entropies",
    "token_losses",
    "token_scores",
    "updated_teacher",
    "weighted_token_losses",
]
