"""The loss of Stage I (Eq. 4): the expected loss over exits, with an entropy term that keeps all depths in use.

    loss_i = sum_t p_t L_i^(t) - beta H(p),   averaged over unmasked tokens

With a prior other than the uniform one, the second term is `beta KL(p || prior)`. For the uniform prior the two differ
by the constant `beta log T`.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from looplm_jax.halting._distribution import entropy, log_exit_distribution, mean_exit_loop
from looplm_jax.halting._priors import kl_divergence
from looplm_jax.losses._cross_entropy import weighted_token_losses
from looplm_jax.losses._masking import mean_weights


@flax.struct.dataclass
class Stage1Metrics:
    """Metrics of Stage I: means over unmasked tokens, with losses and entropy in nats."""

    loss_per_loop: Float[Array, "T"]
    exit_pdf: Float[Array, "T"]
    expected_loss: Float[Array, ""]
    exit_entropy: Float[Array, ""]
    mean_exit_loop: Float[Array, ""]


def stage1(
    token_losses: Float[Array, "T *B"],
    gate_logits: Float[Array, "T *B"],
    *,
    beta: float,
    mask: Float[Array, "*B"] | None = None,
    count: Float[Array, ""] | None = None,
    log_prior: Float[Array, "T"] | None = None,
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Computes Eq. 4 from the losses of all loops.

    Args:
      token_losses: the cross-entropy of each token at each loop, in nats.
      gate_logits: the exit gate before its sigmoid.
      beta: the weight of the entropy, or of the divergence from `log_prior`.
      mask: 1 for tokens that count, 0 for others; by default all count.
      count: the number of tokens by which sums are divided, for those of a microbatch; by default the number of
        unmasked ones.
      log_prior: log-probabilities over loops; None is Eq. 4 as printed.

    Returns:
      The loss, and its metrics.
    """
    # In log space, so that saturated gates have exact probabilities and finite gradients.
    log_pdf = log_exit_distribution(gate_logits)

    weights = mean_weights(mask, count, gate_logits.shape[1:])
    expected = jnp.sum(jnp.exp(log_pdf) * token_losses * weights[None])

    return _finish(expected, token_losses, log_pdf, weights, beta, log_prior)


def stage1_from_hidden(
    hidden: Float[Array, "T B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    gate_logits: Float[Array, "T B S"],
    *,
    beta: float,
    mask: Float[Array, "B S"] | None = None,
    count: Float[Array, ""] | None = None,
    log_prior: Float[Array, "T"] | None = None,
    chunk: int = 128,
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Computes Eq. 4 from hidden states, in one pass over the logits.

    The weights `p_t` of the losses do not depend on the logits, so the gradient of the weighted sum is computed while
    each chunk of logits exists. This takes three matrix products per chunk instead of the four of a backward pass that
    recomputes the logits. Arguments as in `stage1` and `token_losses`.
    """
    log_pdf = log_exit_distribution(gate_logits)
    weights = mean_weights(mask, count, gate_logits.shape[1:])
    expected, token_losses = weighted_token_losses(hidden, head, targets, jnp.exp(log_pdf) * weights[None], chunk=chunk)

    return _finish(expected, token_losses, log_pdf, weights, beta, log_prior)


def _finish(
    expected: Float[Array, ""],
    token_losses: Float[Array, "T *B"],
    log_pdf: Float[Array, "T *B"],
    weights: Float[Array, "*B"],
    beta: float,
    log_prior: Float[Array, "T"] | None,
) -> tuple[Float[Array, ""], Stage1Metrics]:
    """Adds the regularization term and computes the metrics."""
    # `expected` is passed in, because its gradient may be computed together with the logits.
    pdf = jnp.exp(log_pdf)
    mean_entropy = jnp.sum(entropy(log_pdf=log_pdf) * weights)
    # For a uniform prior the divergence is the negative entropy plus a constant.
    regularizer = (
        -mean_entropy if log_prior is None else jnp.sum(kl_divergence(log_pdf=log_pdf, log_prior=log_prior) * weights)
    )

    # All axes except that of the loops.
    over_tokens = tuple(range(1, token_losses.ndim))
    metrics = Stage1Metrics(
        loss_per_loop=jnp.sum(token_losses * weights[None], axis=over_tokens),
        exit_pdf=jnp.sum(pdf * weights[None], axis=over_tokens),
        expected_loss=expected,
        exit_entropy=mean_entropy,
        mean_exit_loop=jnp.sum(mean_exit_loop(pdf) * weights),
    )

    return expected + beta * regularizer, metrics
