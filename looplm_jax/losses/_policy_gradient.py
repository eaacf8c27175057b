"""The losses on answers that the model generated: RLTT, and a clipped policy gradient over tokens and exits.

An update has R rows of N new tokens: G answers to each of P prompts, the answers to a prompt one after the other. A
token is an action with log-probability `log pi`: that of the token at its exit loop, plus `log p(e)` where the exit is
drawn too (`halting.log_exit_probability`).

    A = (r - mean r) / (std r + 1e-6)    in the group of a prompt; GRPO, arXiv 2402.03300
    rho = exp(log pi - log pi_old)
    v = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)              PPO, arXiv 1707.06347

RLTT (arXiv 2602.10520) rewards all loops of an answer, which is generated at a fixed depth, and has no ratio:

    v = -A sum_t omega_t log P^(t)(token)                                  Eq. 6

Both add `kl_weight` times `k3` against a reference. `aggregate` turns terms of tokens into a loss.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from looplm_jax.config import Advantage, Aggregation, LoopWeights
from looplm_jax.halting._distribution import at_least_float32, exit_distribution

_GROUP_EPS = 1e-6
_LARGEST_LOG_RATIO = 20.0  # the exponential of one far larger overflows, and its gradient is NaN


@flax.struct.dataclass
class PolicyGradientMetrics:
    """Metrics of a policy gradient: the aggregated terms of the loss, and the share of tokens that are clipped."""

    policy_loss: Float[Array, ""]
    kl: Float[Array, ""]
    clipped: Float[Array, ""]


@flax.struct.dataclass
class RLTTMetrics:
    """Metrics of RLTT: the aggregated terms of the loss. The divergence is that of the last loop."""

    policy_loss: Float[Array, ""]
    kl: Float[Array, ""]


# Losses


def policy_gradient(
    log_probs: Float[Array, "R N"],
    advantages: Float[Array, "R"],
    mask: Float[Array, "R N"],
    *,
    max_new_tokens: int,
    old_log_probs: Float[Array, "R N"] | None = None,
    reference_log_probs: Float[Array, "R N"] | None = None,
    aggregation: Aggregation = Aggregation.SEQUENCE,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_weight: float = 0.0,
    rows: Float[Array, ""] | None = None,
    tokens: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], PolicyGradientMetrics]:
    """Computes the clipped policy gradient. Gradients reach only `log_probs`.

    Args:
      log_probs: `log pi` of each action, from a replay with the current parameters.
      advantages: the advantage of each row, as `group_advantages` returns it.
      mask: 1 for the tokens of an answer, 0 after its end.
      max_new_tokens: the limit of the rollout, by which `Aggregation.CONSTANT` divides.
      old_log_probs: `log pi` with the parameters of the rollout; by default the current ones, so that the ratio is 1.
      reference_log_probs: `log pi` with the parameters of the reference; None is a divergence of 0.
      aggregation: how terms of tokens become one loss.
      clip_low: how far a ratio may fall below 1.
      clip_high: how far a ratio may rise above 1.
      kl_weight: the weight of the divergence.
      rows: the rows of the batch, for those of a microbatch; by default R.
      tokens: the tokens of the batch, for those of a microbatch; by default the number of unmasked ones.

    Returns:
      The loss, and its metrics.
    """
    log_probs = at_least_float32(log_probs)
    old_log_probs = log_probs if old_log_probs is None else at_least_float32(old_log_probs)
    per_token, is_clipped = clipped_policy_loss(
        log_probs, old_log_probs, advantages[:, None], clip_low=clip_low, clip_high=clip_high
    )

    def total(values: Float[Array, "R N"], kind: Aggregation = aggregation) -> Float[Array, ""]:
        return aggregate(values, mask, kind, max_new_tokens=max_new_tokens, rows=rows, tokens=tokens)

    policy_loss = total(per_token)
    kl = jnp.zeros_like(policy_loss) if reference_log_probs is None else total(k3(log_probs, reference_log_probs))
    clipped = total(is_clipped.astype(log_probs.dtype), Aggregation.TOKEN)

    return policy_loss + kl_weight * kl, PolicyGradientMetrics(policy_loss=policy_loss, kl=kl, clipped=clipped)


def rltt(
    log_probs: Float[Array, "T R N"],
    weights: Float[Array, "T R N"],
    advantages: Float[Array, "R"],
    mask: Float[Array, "R N"],
    *,
    max_new_tokens: int,
    reference_log_probs: Float[Array, "R N"] | None = None,
    aggregation: Aggregation = Aggregation.SEQUENCE,
    kl_weight: float = 1e-3,
    rows: Float[Array, ""] | None = None,
    tokens: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], RLTTMetrics]:
    """Computes RLTT (Eq. 6 and 7). Gradients reach `log_probs`, and `weights` unless they are constants.

    Args:
      log_probs: the log-probability of each token at every loop.
      weights: `omega`, the weight of each loop, as `loop_weights` returns it.
      advantages: the advantage of each row, as `group_advantages` returns it.
      mask: 1 for the tokens of an answer, 0 after its end.
      max_new_tokens: the limit of the rollout, by which `Aggregation.CONSTANT` divides.
      reference_log_probs: those of the reference at the last loop; None is a divergence of 0.
      aggregation: how terms of tokens become one loss.
      kl_weight: the weight of the divergence.
      rows: the rows of the batch, for those of a microbatch; by default R.
      tokens: the tokens of the batch, for those of a microbatch; by default the number of unmasked ones.

    Returns:
      The loss, and its metrics.
    """
    log_probs = at_least_float32(log_probs)
    advantages = jax.lax.stop_gradient(at_least_float32(advantages))[:, None]

    def total(values: Float[Array, "R N"]) -> Float[Array, ""]:
        return aggregate(values, mask, aggregation, max_new_tokens=max_new_tokens, rows=rows, tokens=tokens)

    policy_loss = total(-advantages * trajectory_log_probs(log_probs, weights))
    kl = jnp.zeros_like(policy_loss) if reference_log_probs is None else total(k3(log_probs[-1], reference_log_probs))

    return policy_loss + kl_weight * kl, RLTTMetrics(policy_loss=policy_loss, kl=kl)


# Advantages


def group_advantages(
    rewards: Float[Array, "P G"], advantage: Advantage = Advantage.STD, *, eps: float = _GROUP_EPS
) -> Float[Array, "P G"]:
    """Returns the advantage of each answer within the group of its prompt.

    A group of equal rewards, or of one answer, has advantages of exactly 0.

    Args:
      rewards: the reward of each answer to each prompt.
      advantage: how rewards of a group are compared.
      eps: added to the standard deviation of `Advantage.STD`.
    """
    rewards = at_least_float32(rewards)
    if advantage is Advantage.STD:
        return standardize(rewards, axis=1, eps=eps)

    group, centered = rewards.shape[1], _centered(rewards, axis=1)
    return centered if advantage is Advantage.MEAN else centered * (group / max(group - 1, 1))


def standardize(values: Float[Array, "..."], *, axis: int, eps: float) -> Float[Array, "..."]:
    """Returns `(x - mean) / (std + eps)` along an axis, with the unbiased deviation; exactly 0 where all are equal."""
    centered = _centered(values, axis)
    degrees = max(values.shape[axis] - 1, 1)
    # A product, because XLA rounds a quotient by a constant as the shape has it, and groups would change one another.
    deviation = jnp.sqrt(jnp.sum(jnp.square(centered), axis=axis, keepdims=True) * (1.0 / degrees))

    return centered / (deviation + eps)


def _centered(values: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Returns `x - mean` along an axis, exactly 0 where all are equal."""
    # The mean of equal numbers is rounded, and the difference, divided by its own size, would be an advantage of 1 or
    # -1. Differences from the first number are exact where the numbers are close.
    shifted = values - jax.lax.slice_in_dim(values, 0, 1, axis=axis)
    return shifted - jnp.mean(shifted, axis=axis, keepdims=True)


# Terms of a token


def k3(log_probs: Float[Array, "*B"], reference_log_probs: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns `exp(x) - x - 1` for `x = reference - policy`, an estimate of `KL(policy || reference)`.

    It is never negative but for rounding, and unbiased for tokens that the policy drew. `x` is clipped to +-20, beyond
    which the gradient is 0. Gradients reach only `log_probs`.
    """
    reference = jax.lax.stop_gradient(at_least_float32(reference_log_probs))
    x = jnp.clip(reference - at_least_float32(log_probs), -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return jnp.expm1(x) - x


def policy_ratio(log_probs: Float[Array, "*B"], old_log_probs: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Returns `rho = pi / pi_old`, with its logarithm clipped to +-20. Gradients reach only `log_probs`."""
    difference = at_least_float32(log_probs) - jax.lax.stop_gradient(at_least_float32(old_log_probs))
    return jnp.exp(jnp.clip(difference, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))


def clipped_policy_loss(
    log_probs: Float[Array, "R N"],
    old_log_probs: Float[Array, "R N"],
    advantages: Float[Array, "R 1"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Array, "R N"], Bool[Array, "R N"]]:
    """Returns `-min(rho A, clip(rho) A)` of each token, and whether the bound is the smaller of the two.

    A token whose ratio is clipped has no gradient. On policy, where the ratio is 1, none is.
    """
    advantages = jax.lax.stop_gradient(at_least_float32(advantages))
    ratio = policy_ratio(log_probs, old_log_probs)
    # Chosen by comparison, because the gradient of a minimum or a clip is halved where its arguments are equal.
    too_high = (advantages > 0.0) & (ratio > 1.0 + clip_high)
    too_low = (advantages < 0.0) & (ratio < 1.0 - clip_low)
    bounded = jnp.where(too_high, 1.0 + clip_high, jnp.where(too_low, 1.0 - clip_low, ratio))

    return -advantages * bounded, too_high | too_low


def loop_weights(
    gate_logits: Float[Array, "T *B"], weights: LoopWeights = LoopWeights.EXIT_PDF, *, alpha: float = 1.0
) -> Float[Array, "T *B"]:
    """Returns `omega_t`, the weights of the loops of each token in RLTT. They sum to one over loops.

    Args:
      gate_logits: the exit gate before its sigmoid. Only the weights from the exit distribution read it.
      weights: the rule. With `EXIT_PDF`, gradients reach the gates.
      alpha: the power of the loop in `PROGRESSIVE`.
    """
    if weights in (LoopWeights.EXIT_PDF, LoopWeights.EXIT_PDF_CONSTANT):
        pdf = exit_distribution(gate_logits)
        return pdf if weights is LoopWeights.EXIT_PDF else jax.lax.stop_gradient(pdf)

    wide = at_least_float32(gate_logits)
    loops = jnp.arange(1, wide.shape[0] + 1, dtype=wide.dtype)
    powers = loops ** (alpha if weights is LoopWeights.PROGRESSIVE else 0.0)
    by_loop = (powers / jnp.sum(powers)).reshape(-1, *[1] * (wide.ndim - 1))
    return jnp.broadcast_to(by_loop, wide.shape)


def trajectory_log_probs(log_probs: Float[Array, "T *B"], weights: Float[Array, "T *B"]) -> Float[Array, "*B"]:
    """Returns `sum_t omega_t log P^(t)(token)`, which RLTT uses as `log pi`."""
    return jnp.sum(weights * log_probs, axis=0)


# Aggregation


def aggregate(
    values: Float[Array, "R N"],
    mask: Float[Array, "R N"],
    aggregation: Aggregation,
    *,
    max_new_tokens: int,
    rows: Float[Array, ""] | None = None,
    tokens: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Returns the terms of tokens as one number; 0 for a batch without tokens. A row without tokens counts as 0.

    Args:
      values: a term of the loss for each token.
      mask: 1 for the tokens of an answer, 0 after its end.
      aggregation: the mean that is taken.
      max_new_tokens: the limit of the rollout, by which `Aggregation.CONSTANT` divides.
      rows: the rows of the batch, for those of a microbatch; by default R.
      tokens: the tokens of the batch, for those of a microbatch; by default the number of unmasked ones.
    """
    mask = mask.astype(values.dtype)
    total_rows = jnp.asarray(values.shape[0] if rows is None else rows, values.dtype)
    total_tokens = jnp.sum(mask) if tokens is None else jnp.asarray(tokens, values.dtype)

    match aggregation:
        case Aggregation.SEQUENCE:
            lengths = jnp.maximum(jnp.sum(mask, axis=1), 1.0)
            return jnp.sum(jnp.sum(values * mask, axis=1) / lengths) / total_rows
        case Aggregation.TOKEN:
            return jnp.sum(values * mask) / jnp.maximum(total_tokens, 1.0)
        case Aggregation.CONSTANT:
            return jnp.sum(values * mask) / (total_rows * max_new_tokens)
