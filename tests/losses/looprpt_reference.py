"""LoopRPT in NumPy, term by term, with gradients derived by hand.

Loops lead: [T, B, S] is loops, rows and positions, and [G, T, B, S] has the noisy rollouts first.
"""

import numpy as np
from policy_reference import (
    distribution_gradient,
    exit_gradient,
    k3,
    k3_gradient,
    log_exit_distribution,
    log_exit_probability,
    standardize,
)

STD_EPS = 1e-8
KL_CAP = 10.0


def hard_tokens(entropy, segments, mask, share):
    """Returns 1 for the hard tokens of every segment, by counting, token by token."""
    hard = np.zeros_like(mask)
    for row, position in np.argwhere(mask > 0):
        members = (mask[row] > 0) & (segments[row] == segments[row, position])
        count = members.sum()
        below = (members & (entropy[row] < entropy[row, position])).sum()
        cut = np.floor((1 - share) * (count - 1) + 1e-4)
        hard[row, position] = count == 1 or share == 1 or below > cut
    return hard


def reference_loops(teacher_gates, threshold):
    """Returns the first loop whose CDF reaches the threshold, in 1..T."""
    cdf = np.cumsum(np.exp(log_exit_distribution(teacher_gates)), axis=0)
    reached = cdf >= threshold
    reached[-1] = True
    return np.argmax(reached, axis=0).astype(np.int32) + 1


def looprpt(arrays, settings):
    """Returns the intermediates, the losses and the gradients of section 2, by name, from the inputs of a golden."""
    log_probs, gates, noisy, noisy_gates = (
        arrays[f"in/{name}"] for name in ("log_probs", "gates", "noisy_log_probs", "noisy_gates")
    )
    teacher, sampled = arrays["in/teacher_log_probs"], arrays["in/sampled"]
    loops = np.arange(1, len(log_probs) + 1).reshape(-1, 1, 1)
    out = {}

    out["t_ref"] = reference_loops(arrays["in/teacher_gates"], settings["exit_threshold"])
    out["baseline"] = np.take_along_axis(teacher, out["t_ref"][None] - 1, axis=0)[0]
    out["hard"] = hard_tokens(
        arrays["in/teacher_entropy"], arrays["in/segments"], arrays["in/mask"], settings["hard_share"]
    )
    weights = out["hard"] / max(out["hard"].sum(), 1)

    difficulty = np.clip(arrays["in/teacher_entropy"] / np.log(settings["vocab_size"]), 0, 1)
    out["penalty"] = settings["penalty"] * (1 + settings["penalty_scale"] * (1 - difficulty))
    time = out["penalty"] * (loops - out["t_ref"])
    out["rewards"] = log_probs - out["baseline"] - time
    out["noisy_rewards"] = noisy - out["baseline"] - time
    chosen = sampled[:, None] - 1
    out["sampled_rewards"] = np.take_along_axis(out["noisy_rewards"], chosen, axis=1)[:, 0]

    out["advantages"] = standardize(out["sampled_rewards"], 0, STD_EPS)
    out["loop_advantages"] = standardize(out["rewards"], 0, STD_EPS)
    log_pdf = log_exit_distribution(gates)
    pdf = np.exp(log_pdf)
    out["weights"] = pdf * (1 + np.maximum(out["loop_advantages"], 0))
    out["sampled_log_pdf"] = np.stack([log_exit_probability(g, e) for g, e in zip(noisy_gates, sampled)])
    out["entropy"] = -np.sum(pdf * log_pdf, axis=0)
    divergence = k3(noisy, teacher)
    out["k3"] = np.minimum(divergence, KL_CAP)

    rollouts = len(noisy)
    out["loss_pg"] = -np.sum(weights * out["advantages"] * out["sampled_log_pdf"]) / rollouts
    out["loss_rep"] = -np.sum(weights * out["weights"] * log_probs)
    out["loss_entropy"] = -np.sum(weights * out["entropy"])
    out["loss_kl"] = np.sum(weights * out["k3"]) / rollouts
    out["loss"] = (
        settings["pg_weight"] * out["loss_pg"]
        + settings["rep_weight"] * out["loss_rep"]
        + settings["entropy_weight"] * out["loss_entropy"]
        + settings["kl_weight"] * out["loss_kl"]
    )

    policy = -weights * out["advantages"] * settings["pg_weight"] / rollouts
    slope = np.where(divergence < KL_CAP, k3_gradient(noisy, teacher), 0)
    gradients = {
        "log_probs": -settings["rep_weight"] * weights * out["weights"],
        # d(-H)/dp = log p + 1, and the 1 has no effect because p sums to one.
        "gates": settings["entropy_weight"] * distribution_gradient(gates, weights * log_pdf),
        "noisy_log_probs": settings["kl_weight"] * weights * slope / rollouts,
        "noisy_gates": np.stack([p * exit_gradient(g, e) for p, g, e in zip(policy, noisy_gates, sampled)]),
    }
    return out, gradients
