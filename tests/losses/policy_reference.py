"""Group advantages, aggregation, RLTT and the clipped policy gradient in NumPy, with gradients derived by hand.

Loops lead: [T, R, N] is loops, rows (prompts x answers, prompt-major) and new tokens.
"""

import numpy as np


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def log_exit_distribution(gates):
    """Returns log p_t from its definition: the gates of earlier loops say no, that of loop t < T says yes."""
    reached = np.cumsum(np.concatenate([np.zeros_like(gates[:1]), log_sigmoid(-gates[:-1])]), axis=0)
    return reached + np.concatenate([log_sigmoid(gates[:-1]), np.zeros_like(gates[:1])])


def log_exit_probability(gates, exit_loops):
    return np.take_along_axis(log_exit_distribution(gates), exit_loops[None] - 1, axis=0)[0]


def exit_gradient(gates, exit_loops):
    """Returns d log p(e) / d gates."""
    loops = np.arange(1, len(gates) + 1).reshape(-1, *[1] * exit_loops.ndim)
    exits = (loops == exit_loops) & (loops < len(gates))
    return np.where(loops < exit_loops, -sigmoid(gates), 0) + np.where(exits, sigmoid(-gates), 0)


def distribution_gradient(gates, cotangent):
    """Returns the gradient of `sum(cotangent * p)` with respect to the gates."""
    pulled = cotangent * np.exp(log_exit_distribution(gates))
    shape = gates.shape[1:]
    return sum(pulled[e] * exit_gradient(gates, np.full(shape, e + 1)) for e in range(len(gates)))


def k3(policy, reference):
    x = np.clip(reference - policy, -20, 20)
    return np.exp(x) - x - 1


def k3_gradient(policy, reference):
    """Returns d k3 / d policy."""
    x = reference - policy
    return np.where(np.abs(x) < 20, 1 - np.exp(np.clip(x, -20, 20)), 0)


def standardize(x, axis, eps):
    """Returns (x - mean) / (std + eps) with the unbiased std, and 0 where all are equal."""
    equal = np.max(x, axis, keepdims=True) == np.min(x, axis, keepdims=True)
    scaled = (x - np.mean(x, axis, keepdims=True)) / (np.std(x, axis, ddof=1, keepdims=True) + eps)
    return np.where(equal, 0, scaled)


def group_advantages(rewards, kind):
    centered = rewards - np.mean(rewards, axis=1, keepdims=True)
    group = rewards.shape[1]
    return {
        "std": standardize(rewards, 1, 1e-6),
        "mean": centered,
        "leave_one_out": centered * group / (group - 1),
    }[kind]


def token_weights(mask, kind, max_new_tokens):
    """Returns the weight of each token, so that the aggregate of v is `sum(weights * v)`."""
    rows = len(mask)
    return {
        "sequence": mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / rows,
        "token": mask / max(mask.sum(), 1),
        "constant": mask / (rows * max_new_tokens),
    }[kind]


def clipped(log_policy, old_log_policy, advantages, clip_low, clip_high):
    """Returns the ratio, the loss of each token, its gradient with respect to `log_policy`, and who is clipped."""
    difference = log_policy - old_log_policy
    ratio = np.exp(np.clip(difference, -20, 20))
    bounded = np.clip(ratio, 1 - clip_low, 1 + clip_high)
    is_clipped = bounded * advantages < ratio * advantages
    slope = np.where(np.abs(difference) < 20, ratio, 0)
    loss = -np.minimum(ratio * advantages, bounded * advantages)
    return ratio, loss, np.where(is_clipped, 0, -slope * advantages), is_clipped


def loop_weights(kind, gates, alpha, loop_logits):
    loops, tokens = np.arange(1.0, len(gates) + 1), gates.shape[1:]
    fixed = {
        "uniform": np.ones_like(loops),
        "progressive": loops**alpha,
        "learned": np.exp(loop_logits),
    }
    if kind in fixed:
        return np.broadcast_to((fixed[kind] / fixed[kind].sum()).reshape(-1, 1, 1), (len(loops), *tokens))
    return np.exp(log_exit_distribution(gates))
