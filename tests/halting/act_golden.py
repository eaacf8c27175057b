"""Adaptive Computation Time and the signals of the Universal Transformer, from an own reading in float64 NumPy.

`python tests/halting/act_golden.py` computes data/act.npz again from the inputs that it holds. Its interpolated
outputs without a forced last loop, their gradients included, equal a public PyTorch port of the published routine to
2e-15.

`logits`, `p`: halting logits [T, B, S] and their sigmoid. `states` [T, B, S, D], given. The objective is
`sum(cotangent * output) + tau * ponder_cost`. `forced/` halts every token at loop T, `as_published/` does not.

In `toy/` the states depend on halting: a halted token keeps its state (`copy`) or is still transformed (`continue`).
"""

import functools
import pathlib

import numpy as np

_FILE = pathlib.Path(__file__).parent.parent / "data" / "act.npz"
_INPUTS = ("logits", "states", "cotangent", "epsilon", "tau")
_TOY_INPUTS = ("toy/W", "toy/U", "toy/gate", "toy/gate_bias", "toy/initial", "toy/mix")


@functools.cache
def golden_arrays() -> dict[str, np.ndarray]:
    with np.load(_FILE) as arrays:
        return dict(arrays)


def computed(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns all arrays of the file, from its inputs."""
    arrays = {name: inputs[name] for name in (*_INPUTS, *_TOY_INPUTS)}
    arrays["p"] = _sigmoid(inputs["logits"])

    for name, forced in (("forced", True), ("as_published", False)):
        for key, value in _halting(arrays, forced=forced).items():
            arrays[f"{name}/{key}"] = value
    for name in ("continue", "copy"):
        for key, value in _toy(inputs, copy=name == "copy").items():
            arrays[f"toy/{name}/{key}"] = value

    return arrays | _signals(time=5, positions=7, width=6)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _weights(p, epsilon, *, forced):
    """Returns weights, remainders, updates and which tokens halt, token by token as the text defines them."""
    weights, remainders = np.zeros_like(p), np.zeros(p.shape[1:])
    updates, halted = np.zeros(p.shape[1:], np.int32), np.zeros(p.shape[1:], bool)

    for token in np.ndindex(p.shape[1:]):
        total = 0.0
        for loop in range(len(p)):
            updates[token] = loop + 1
            halted[token] = total + p[(loop, *token)] > 1 - epsilon or (forced and loop == len(p) - 1)
            if halted[token]:
                weights[(loop, *token)] = remainders[token] = 1 - total
                break
            weights[(loop, *token)] = p[(loop, *token)]
            total += p[(loop, *token)]

    return weights, remainders, updates, halted


def _halting(arrays, *, forced):
    p, states, cotangent, tau = (arrays[name] for name in ("p", "states", "cotangent", "tau"))
    weights, remainders, updates, halted = _weights(p, arrays["epsilon"], forced=forced)
    cost = np.mean(updates + remainders)

    loop = np.arange(1, len(p) + 1)[:, None, None]
    before = (loop < updates) & halted  # their probabilities reduce the remainder
    of_ponder = np.where(before, -1.0 / updates.size, 0.0)

    def of_p(of_weights):
        at_halt = np.sum(np.where((loop == updates) & halted, of_weights, 0), axis=0)
        running = np.where(halted, loop < updates, True)
        return np.where(running, of_weights, 0) - np.where(before, at_halt, 0) + tau * of_ponder

    summed = np.sum(weights[..., None] * states, axis=0)
    interpolated = [np.zeros_like(summed)]
    for weight, state in zip(weights, states):
        interpolated.append(weight[..., None] * state + (1 - weight[..., None]) * interpolated[-1])

    of_output, of_weights, of_states = cotangent, np.zeros_like(weights), np.zeros_like(states)
    for t in reversed(range(len(p))):
        of_weights[t] = np.sum(of_output * (states[t] - interpolated[t]), axis=-1)
        of_states[t] = weights[t][..., None] * of_output
        of_output = (1 - weights[t][..., None]) * of_output

    return {
        "weights": weights,
        "remainders": remainders,
        "n_updates": updates,
        "ponder_cost": cost,
        "grad_p_of_ponder": of_ponder,
        "weighted_sum": summed,
        "weighted_sum/grad_p": of_p(np.sum(cotangent * states, axis=-1)),
        "weighted_sum/grad_states": weights[..., None] * cotangent,
        "weighted_sum/objective": np.sum(cotangent * summed) + tau * cost,
        "interpolated": interpolated[-1],
        "interpolated/grad_p": of_p(of_weights),
        "interpolated/grad_states": of_states,
        "interpolated/objective": np.sum(cotangent * interpolated[-1]) + tau * cost,
    }


def _toy(inputs, *, copy):
    state, total, states, p = inputs["toy/initial"], 0.0, [], []
    for _ in range(len(inputs["logits"])):
        # The gate reads the state before the loop transforms it.
        p.append(_sigmoid(state @ inputs["toy/gate"] + inputs["toy/gate_bias"]))
        running = total <= 1 - inputs["epsilon"]
        following = np.tanh(state @ inputs["toy/W"] + (inputs["toy/mix"] @ state) @ inputs["toy/U"])
        state = np.where(np.broadcast_to(running, p[-1].shape)[..., None], following, state) if copy else following
        total = total + p[-1]
        states.append(state)

    weights, remainders, updates, _ = _weights(np.stack(p), inputs["epsilon"], forced=True)
    return {
        "states": np.stack(states),
        "p": np.stack(p),
        "weights": weights,
        "n_updates": updates,
        "remainders": remainders,
        "output": np.sum(weights[..., None] * np.stack(states), axis=0),
    }


def _signals(*, time, positions, width):
    def text(count):
        angles = np.arange(1, count + 1)[:, None] / 1e4 ** (np.arange(0, width, 2) / width)
        return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(count, width)

    def code(count):
        half = width // 2
        angles = np.arange(count)[:, None] * 1e4 ** (-np.arange(half) / (half - 1))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    return {
        "ut/coordinates": text(time)[:, None] + text(positions),
        "ut/code_position": code(positions),
        "ut/code_time": code(time),
    }


if __name__ == "__main__":
    np.savez_compressed(_FILE, **computed(golden_arrays()))
