"""The goldens of LoopRPT, RLTT and the policy gradient: inputs, and all outputs and gradients in float64.

`python tests/losses/loss_goldens.py` computes the outputs again from the inputs in the files, with NumPy, and writes
the files. `test_goldens_are_reproduced` in test_loss_goldens.py compares the two.
"""

import functools
from pathlib import Path

import looprpt_reference
import numpy as np
import policy_reference as reference

DATA = Path(__file__).parent.parent / "data"
ADVANTAGES = ("std", "mean", "leave_one_out")
AGGREGATIONS = ("sequence", "token", "constant")
WEIGHTINGS = ("uniform", "progressive", "exit_pdf", "exit_pdf_constant", "learned")

LOOPRPT = {
    "vocab_size": 97,
    "exit_threshold": 0.5,
    "hard_share": 0.2,
    "penalty": 0.02,
    "penalty_scale": 0.5,
    "entropy_weight": 0.01,
    "kl_weight": 0.001,
    "pg_weight": 1.0,
    "rep_weight": 1.0,
}
TEACHER_DECAY = 0.995
RLTT = {"kl_weight": 0.001, "alpha": 2.0, "max_new_tokens": 7}
POLICY = {"clip_low": 0.2, "clip_high": 0.28, "loop_cost": 0.1}
MAX_NEW_TOKENS = {"arrays": 7, "tree": 2}


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def make_looprpt(arrays):
    """Returns the outputs of LoopRPT, of a share of 1, of the teacher's update, and the hard tokens among ties."""
    out, gradients = looprpt_reference.looprpt(arrays, LOOPRPT)
    every, _ = looprpt_reference.looprpt(arrays, LOOPRPT | {"hard_share": 1.0})
    ties = under(arrays, "ties/")
    made = {f"out/{name}": value for name, value in out.items()}
    made |= {f"grad/{name}": value for name, value in gradients.items()}
    made |= {f"share_1/{name}": every[name] for name in ("hard", "loss")}
    made["update/out"] = TEACHER_DECAY * arrays["update/teacher"] + (1 - TEACHER_DECAY) * arrays["update/student"]
    for share in (0.2, 0.5):
        made[f"ties/hard_{share}"] = looprpt_reference.hard_tokens(
            ties["entropy"], ties["segments"], ties["mask"], share
        )
    return made


def make_rltt(arrays):
    """Returns the losses and gradients of RLTT for every weighting of the loops and every aggregation."""
    log_probs, gates, mask = (arrays[f"in/{name}"] for name in ("log_probs", "gates", "mask"))
    made = {f"out/advantages/{kind}": reference.group_advantages(arrays["in/rewards"], kind) for kind in ADVANTAGES}
    advantages = made["out/advantages/std"].reshape(-1, 1)

    for kind in WEIGHTINGS:
        omega = reference.loop_weights(kind, gates, RLTT["alpha"], arrays["in/loop_logits"])
        mixed = made[f"out/{kind}/mixed"] = np.sum(omega * log_probs, axis=0)
        for aggregation in AGGREGATIONS:
            weights = reference.token_weights(mask, aggregation, RLTT["max_new_tokens"])
            policy_loss = -np.sum(weights * advantages * mixed)
            kl = np.sum(weights * reference.k3(log_probs[-1], arrays["in/reference"]))
            losses = {"loss": policy_loss + RLTT["kl_weight"] * kl, "loss_pg": policy_loss, "loss_kl": kl}
            made |= {f"out/{kind}/{aggregation}/{name}": loss for name, loss in losses.items()}

            # d loss / d omega; omega of the exit distribution and the learned one have gradients.
            cotangent = -weights * advantages * log_probs
            gradient = -weights * advantages * omega
            gradient[-1] += RLTT["kl_weight"] * weights * reference.k3_gradient(log_probs[-1], arrays["in/reference"])
            gradients = {"log_probs": gradient}
            if kind == "exit_pdf":
                gradients["gates"] = reference.distribution_gradient(gates, cotangent)
            if kind == "learned":
                share, pulled = omega[:, 0, 0], cotangent.sum(axis=(1, 2))
                gradients["loop_logits"] = share * (pulled - np.sum(share * pulled))
            made |= {f"grad/{kind}/{aggregation}/{name}": value for name, value in gradients.items()}

    return made


def make_policy_arrays(arrays):
    """Returns the clipped loss of tokens and exits (`joint`), and of tokens alone, with gradients."""
    gates, exits, mask = (arrays[f"in/{name}"] for name in ("gates", "exit_loops", "mask"))
    exit_log_probs = reference.log_exit_probability(gates, exits)
    loops = np.sum(exits * mask, axis=1) / np.maximum(mask.sum(axis=1), 1)
    rewards = arrays["in/answer_rewards"]
    rewards = rewards - POLICY["loop_cost"] * (loops / len(gates)).reshape(rewards.shape)
    made = {"out/exit_log_probs": exit_log_probs, "out/rewards": rewards}
    made |= {f"out/advantages/{kind}": reference.group_advantages(rewards, kind) for kind in ADVANTAGES}
    advantages = made["out/advantages/std"].reshape(-1, 1)

    tokens = arrays["in/log_probs"], arrays["in/old_log_probs"]
    joint = tokens[0] + exit_log_probs, tokens[1] + arrays["in/old_exit_log_probs"]
    for credit, (policy, old) in {"joint": joint, "tokens": tokens}.items():
        ratio, loss, slope, clipped = reference.clipped(
            policy, old, advantages, POLICY["clip_low"], POLICY["clip_high"]
        )
        made[f"{credit}/ratio"] = ratio
        for aggregation in AGGREGATIONS:
            weights = reference.token_weights(mask, aggregation, MAX_NEW_TOKENS["arrays"])
            made[f"{credit}/{aggregation}/loss"] = np.sum(weights * loss)
            made[f"{credit}/{aggregation}/clipped"] = np.sum(mask * clipped) / mask.sum()
            made[f"{credit}/{aggregation}/grad_log_probs"] = weights * slope
            if credit == "joint":
                made[f"{credit}/{aggregation}/grad_gates"] = weights * slope * reference.exit_gradient(gates, exits)

    return made


def make_tree(arrays):
    """Returns the expected reward of an enumerable policy, its gradient, and that of the loss over groups of two."""
    gates, logits = arrays["in/gates"].T, arrays["in/logits"]  # [T, nodes], [nodes, T, V]
    nodes, exits, tokens, mask = (arrays[f"in/{name}"] for name in ("nodes", "exit_loops", "tokens", "mask"))
    log_softmax = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    exit_log_probs = reference.log_exit_probability(gates[:, nodes], exits)
    log_probs = log_softmax[nodes, exits - 1, tokens]
    loops = np.sum(exits * mask, axis=1) / mask.sum(axis=1)
    rewards = arrays["in/answer_rewards"] - POLICY["loop_cost"] * loops / len(gates)
    probabilities = np.exp(np.sum(mask * (exit_log_probs + log_probs), axis=1))
    made = {
        "out/rewards": rewards,
        "out/exit_log_probs": exit_log_probs,
        "out/log_probs": log_probs,
        "out/probabilities": probabilities,
        "out/J": np.sum(probabilities * rewards),
    }

    def to_parameters(weights):
        """Returns the gradient of `sum(weights * log pi)` with respect to gates and logits, for weights [rows, N]."""
        gate_gradient, logit_gradient = np.zeros_like(gates.T), np.zeros_like(logits)
        by_gate = weights * mask * reference.exit_gradient(gates[:, nodes], exits)
        by_logit = np.eye(logits.shape[-1])[tokens] - np.exp(log_softmax[nodes, exits - 1])
        np.add.at(gate_gradient, nodes, np.moveaxis(by_gate, 0, -1))
        np.add.at(logit_gradient, (nodes, exits - 1), (weights * mask)[..., None] * by_logit)
        return gate_gradient, logit_gradient

    made["out/dJ_gates"], made["out/dJ_logits"] = to_parameters((probabilities * rewards)[:, None] * np.ones((1, 2)))

    # All groups of two: the loss at the rollout's parameters has ratio 1, so its gradient is -weight * advantage.
    first, second = (index.ravel() for index in np.indices((len(rewards), len(rewards))))
    chances = probabilities[first] * probabilities[second]
    for kind in ADVANTAGES:
        advantages = reference.group_advantages(np.stack([rewards[first], rewards[second]], axis=1), kind)
        for aggregation in AGGREGATIONS:
            weights = np.zeros_like(mask)
            for group, (chance, pair) in enumerate(zip(chances, zip(first, second))):
                rows = list(pair)
                shares = reference.token_weights(mask[rows], aggregation, MAX_NEW_TOKENS["tree"])
                np.add.at(weights, rows, -chance * shares * advantages[group][:, None])
            name = f"expected/{kind}/{aggregation}"
            made[f"{name}/gates"], made[f"{name}/logits"] = to_parameters(weights)

    return made


def make_grpo_depth(arrays):
    """Returns the outputs of both parts: random arrays, and the tree."""
    made = {f"arrays/{name}": value for name, value in make_policy_arrays(under(arrays, "arrays/")).items()}
    return made | {f"tree/{name}": value for name, value in make_tree(under(arrays, "tree/")).items()}


MAKERS = {"looprpt": make_looprpt, "rltt": make_rltt, "grpo_depth": make_grpo_depth}

if __name__ == "__main__":
    for name, make in MAKERS.items():
        arrays = golden(name)
        np.savez_compressed(DATA / f"{name}.npz", **(arrays | make(arrays)))
        print(f"wrote {DATA / name}.npz")
