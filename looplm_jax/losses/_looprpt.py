"""The loss of LoopRPT (arXiv 2603.19714): exits are actions, rewarded by how well they predict the given text.

The student is trained on hard tokens: those of the highest entropy of the teacher, which is an average of earlier
students. `l_t` is the log-probability of the given token at loop t, and `p` the exit distribution. A bar is the
teacher's, a tilde that of the student with noise on its states, and `sg` stops gradients. M is the number of hard
tokens, over which all sums run.

    t_ref = min { k : CDFbar(k) >= 0.5 },   b = lbar_{t_ref}
    lam = penalty (1 + penalty_scale (1 - clip(H / ln V, 0, 1)))
    R_k = sg(l_k) - b - lam (k - t_ref)                                         the reward of loop k
    r_g = sg(l~_{tau_g}) - b - lam (tau_g - t_ref),   tau_g ~ p~^(g)            that of rollout g = 1..G
    A' = standardize(R) over loops,   A = standardize(r) over rollouts

    L_PG  = -(1/(G M)) sum_g A_g log p~^(g)(tau_g)
    L_rep = -(1/M) sum_k sg(p_k (1 + relu(A'_k))) l_k
    L_ent = -(1/M) H(p)
    L_KL  = (1/(G M)) sum_g sum_k min(k3(l~_k^(g), lbar_k), 10)
    L     = L_PG + L_rep + 0.01 L_ent + 0.001 L_KL
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from looplm_jax.errors import UserError
from looplm_jax.halting._distribution import (
    at_least_float32,
    entropy,
    exit_distribution,
    log_exit_distribution,
    log_exit_probability,
    q_exit,
)
from looplm_jax.losses._masking import mean_weights
from looplm_jax.losses._policy_gradient import k3, standardize

_STD_EPS = 1e-8
_LARGEST_K3 = 10.0


@flax.struct.dataclass
class TeacherScores:
    """The teacher's log-probability of each given token, its gates, and the entropy of its last prediction in nats."""

    log_probs: Float[Array, "T B S"]
    gate_logits: Float[Array, "T B S"]
    entropy: Float[Array, "B S"]


@flax.struct.dataclass
class NoisyRollouts:
    """The student under G draws of noise: log-probabilities of the given tokens, gates, and exit loops in 1..T.

    The exit loops are drawn from the exit distribution of the same rollout.
    """

    log_probs: Float[Array, "G T B S"]
    gate_logits: Float[Array, "G T B S"]
    exit_loops: Int[Array, "G B S"]


@flax.struct.dataclass
class LoopRPTMetrics:
    """Metrics of LoopRPT: means over hard tokens, in nats and loops, and the number of hard tokens."""

    policy_loss: Float[Array, ""]
    representation_loss: Float[Array, ""]
    exit_entropy: Float[Array, ""]
    kl: Float[Array, ""]
    reward: Float[Array, ""]
    exit_loop: Float[Array, ""]
    reference_loop: Float[Array, ""]
    hard_tokens: Float[Array, ""]


def looprpt(
    log_probs: Float[Array, "T B S"],
    gate_logits: Float[Array, "T B S"],
    teacher: TeacherScores,
    noisy: NoisyRollouts,
    *,
    mask: Float[Array, "B S"],
    segment_ids: Int[Array, "B S"],
    vocab_size: int,
    hard_share: float = 0.2,
    exit_threshold: float = 0.5,
    penalty: float = 0.02,
    penalty_scale: float = 0.5,
    policy_weight: float = 1.0,
    representation_weight: float = 1.0,
    entropy_weight: float = 0.01,
    kl_weight: float = 1e-3,
    count: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], LoopRPTMetrics]:
    """Computes the loss of LoopRPT.

    Gradients reach the gates of the rollouts through the policy, the log-probabilities through the representation, the
    gates through the entropy, and the log-probabilities of the rollouts through the divergence. None reaches the
    teacher. With one loop or one rollout, there is nothing to compare, and advantages are 0.

    Args:
      log_probs: the log-probability of each given token at each loop, without noise.
      gate_logits: the exit gate before its sigmoid, without noise.
      teacher: what the teacher computes of the same tokens, without noise.
      noisy: rollouts of the student.
      mask: 1 for tokens that are learned, 0 for others.
      segment_ids: the document of each token. Hard tokens are chosen within documents.
      vocab_size: V; an entropy of ln V has the lowest penalty.
      hard_share: the share of the tokens of a document that are hard; 1 is all of them.
      exit_threshold: the cumulative exit probability of the teacher's reference loop.
      penalty: the price of a loop, in nats.
      penalty_scale: how much higher the price is for a token of no entropy.
      policy_weight: the weight of L_PG.
      representation_weight: the weight of L_rep.
      entropy_weight: the weight of L_ent.
      kl_weight: the weight of L_KL.
      count: the number of tokens by which sums are divided, for those of a microbatch; by default the number of hard
        ones.

    Returns:
      The loss, and its metrics.

    Raises:
      UserError: the scores of the teacher or of the rollouts are of another batch or number of loops.
    """
    _check_same_shape(log_probs, teacher, noisy)
    log_probs, teacher, noisy = at_least_float32(log_probs), _wide(jax.lax.stop_gradient(teacher)), _wide(noisy)
    num_rollouts = noisy.exit_loops.shape[0]

    hard = hard_tokens(teacher.entropy, segment_ids, mask, hard_share)
    weights = mean_weights(hard, count, hard.shape)

    # What each loop is worth, without noise and in the rollouts.
    reference_loop = q_exit(exit_distribution(teacher.gate_logits), exit_threshold)
    charge = loop_penalty(teacher.entropy, vocab_size, penalty, penalty_scale)
    rewards = loop_rewards(log_probs, teacher.log_probs, reference_loop, charge)
    sampled_rewards = at_loops(
        loop_rewards(noisy.log_probs, teacher.log_probs, reference_loop, charge), noisy.exit_loops
    )
    # Rollouts of the same token are compared, so the difficulty of the token cancels.
    advantages = standardize(sampled_rewards, axis=0, eps=_STD_EPS)

    # L_PG reaches the gates of the rollouts only: rewards and advantages are constants.
    sampled_log_pdf = jax.vmap(log_exit_probability)(noisy.gate_logits, noisy.exit_loops)
    policy_loss = -jnp.sum(weights * jnp.mean(advantages * sampled_log_pdf, axis=0))

    # L_rep and L_ent are those of the student without noise.
    log_pdf = log_exit_distribution(gate_logits)
    representation_loss = -jnp.sum(weights[None] * representation_weights(log_pdf, rewards) * log_probs)
    exit_entropy = jnp.sum(weights * entropy(log_pdf=log_pdf))

    # L_KL compares every loop of every rollout with the same loop of the teacher.
    divergence = capped_k3(noisy.log_probs, teacher.log_probs)
    kl = jnp.sum(weights[None, None] * divergence) / num_rollouts

    loss = (
        policy_weight * policy_loss
        + representation_weight * representation_loss
        - entropy_weight * exit_entropy
        + kl_weight * kl
    )
    metrics = LoopRPTMetrics(
        policy_loss=policy_loss,
        representation_loss=representation_loss,
        exit_entropy=exit_entropy,
        kl=kl,
        reward=jnp.sum(weights * jnp.mean(sampled_rewards, axis=0)),
        exit_loop=jnp.sum(weights * jnp.mean(noisy.exit_loops.astype(hard.dtype), axis=0)),
        reference_loop=jnp.sum(weights * reference_loop.astype(hard.dtype)),
        hard_tokens=jnp.sum(hard),
    )

    return loss, metrics


def updated_teacher(teacher: PyTree, student: PyTree, decay: float) -> PyTree:
    """Returns `decay teacher + (1 - decay) student`, in the dtype of the teacher, which should be float32.

    In bfloat16, a decay of 0.995 would leave the teacher as it is. A decay of 1 freezes it.
    """
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new.astype(old.dtype), teacher, student)


# Tokens


def hard_tokens(
    entropy: Float[Array, "B S"], segment_ids: Int[Array, "B S"], mask: Float[Array, "B S"], share: float
) -> Float[Array, "B S"]:
    """Returns 1 for the `share` of the tokens of each document that have the highest entropy, and 0 for the others.

    Among the n unmasked tokens of a document, one is hard if more than `floor((1 - share) (n - 1))` have a lower
    entropy: if it is strictly above the interpolated quantile of 1 - share. Ties at the quantile are not hard. A single
    token is hard, and with a share of 1 all are.
    """
    counted = mask > 0
    if share == 1.0:
        return counted.astype(entropy.dtype)

    # Every token is compared with every other of its row. The comparison is fused into the sums.
    peers = counted[:, None, :] & (segment_ids[:, None, :] == segment_ids[:, :, None])  # [B, S, peers]
    below = peers & (entropy[:, None, :] < entropy[:, :, None])
    num_peers, num_below = (jnp.sum(pairs, axis=-1, dtype=jnp.int32) for pairs in (peers, below))

    cuts = jnp.asarray(_rank_cuts(entropy.shape[1], share))
    return (counted & (num_below > cuts[num_peers])).astype(entropy.dtype)


def _rank_cuts(longest: int, share: float) -> np.ndarray:
    """Returns the rank that a hard token must exceed in a document of n tokens, for n = 0..longest.

    In float64, because the product of a long document would be off by one in float32.
    """
    sizes = np.arange(longest + 1)
    # The offset corrects products that are a whole number but for rounding.
    cuts = np.floor((1.0 - share) * (sizes - 1) + 1e-4).astype(np.int32)
    return np.where(sizes <= 1, -1, cuts).astype(np.int32)


# Rewards


def loop_penalty(
    entropy: Float[Array, "B S"], vocab_size: int, penalty: float, penalty_scale: float
) -> Float[Array, "B S"]:
    """Returns `lam`, the price of one more loop: the lower the entropy of a token, the higher."""
    difficulty = jnp.clip(entropy / np.log(vocab_size).item(), 0.0, 1.0)
    return penalty * (1.0 + penalty_scale * (1.0 - difficulty))


def loop_rewards(
    log_probs: Float[Array, "*G T B S"],
    teacher_log_probs: Float[Array, "T B S"],
    reference_loop: Int[Array, "B S"],
    penalty: Float[Array, "B S"],
) -> Float[Array, "*G T B S"]:
    """Returns the reward of an exit at each loop, as a constant: the gain over the teacher, minus the price of loops.

    Exits before the reference loop earn the price of the loops that they save.
    """
    loops = jnp.arange(1, teacher_log_probs.shape[0] + 1, dtype=jnp.int32)[:, None, None]
    baseline = at_loops(teacher_log_probs, reference_loop)
    price = penalty[None] * (loops - reference_loop[None]).astype(penalty.dtype)

    rollouts = tuple(range(log_probs.ndim - price.ndim))  # the axes *G
    baseline, price = jnp.expand_dims(baseline[None], rollouts), jnp.expand_dims(price, rollouts)
    return jax.lax.stop_gradient(log_probs) - baseline - price


def at_loops(values: Float[Array, "*G T B S"], loops: Int[Array, "*G B S"]) -> Float[Array, "*G B S"]:
    """Returns the value of each token at its own loop, counted from 1."""
    return jnp.take_along_axis(values, loops[..., None, :, :] - 1, axis=-3)[..., 0, :, :]


# Terms


def representation_weights(log_pdf: Float[Array, "T B S"], rewards: Float[Array, "T B S"]) -> Float[Array, "T B S"]:
    """Returns `p_k (1 + relu(A'_k))` as a constant: the weight of each loop in L_rep."""
    advantages = standardize(rewards, axis=0, eps=_STD_EPS)
    return jax.lax.stop_gradient(jnp.exp(log_pdf) * (1.0 + jax.nn.relu(advantages)))


def capped_k3(
    log_probs: Float[Array, "*G T B S"], teacher_log_probs: Float[Array, "T B S"]
) -> Float[Array, "*G T B S"]:
    """Returns `min(k3, 10)`. A token that the noise made worse by more than about 2.6 nats is not pulled back."""
    teacher = jnp.broadcast_to(teacher_log_probs, log_probs.shape)
    return jnp.minimum(k3(log_probs, teacher), _LARGEST_K3)


def _check_same_shape(log_probs: Float[Array, "T B S"], teacher: TeacherScores, noisy: NoisyRollouts) -> None:
    """Raises UserError if scores have other shapes than those of the student, which would be broadcast."""
    for name, shape in (
        ("teacher", teacher.log_probs.shape),
        ("teacher", teacher.gate_logits.shape),
        ("noisy rollouts", noisy.log_probs.shape[1:]),
    ):
        if shape != log_probs.shape:
            raise UserError(
                f"scores of the {name} have the shape {shape}, and those of the student {log_probs.shape}; "
                "score the same batch with the same number of loops"
            )


def _wide(scores: PyTree) -> PyTree:
    """Returns the arrays in float32, or wider if they are; whole numbers as they are."""
    return jax.tree.map(lambda x: at_least_float32(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, scores)
