"""A tiny model with a byte-level tokenizer, and a plain reference for its scores."""

import functools

import jax
import numpy as np

from looplm_jax.models._looplm import head_matrix

LENGTH = 64  # one shape for all calls of the reference


@functools.cache
def _forward(model, loops):
    return jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, loops=loops))


def forward(loaded, tokens, loops):
    """Computes log-probabilities and exit probabilities after each token at every loop, with NumPy from the states."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    output = jax.device_get(_forward(loaded.model, loops)(loaded.params, padded))
    hidden, gates = output.hidden[:, 0, : len(tokens)], output.gate_logits[:, 0, : len(tokens)]
    logits = hidden.astype(np.float64) @ np.asarray(head_matrix(loaded.params, loaded.model.config), np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)), 1 / (1 + np.exp(-gates.astype(np.float64)))


def log_probs_of(loaded, context, continuation, loops):
    """Returns the log-probability of each token of the continuation at every loop, and whether it is the arg-max."""
    log_probs, _ = forward(loaded, [*context, *continuation][:-1], loops)
    at_end = log_probs[:, -len(continuation) :]
    return at_end[:, range(len(continuation)), continuation], at_end.argmax(axis=-1) == continuation
