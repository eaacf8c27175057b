"""A reference decoder for the cache strategies: one loop of one token at a time, with lists as the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from looplm_jax.inference import CacheStrategy
from looplm_jax.models._blocks import make_context
from looplm_jax.models._looplm import ModelCache, head_matrix

ROOM = 64
RING = CacheStrategy("ring(2)")


def _in_ring(entries, t, planes=2):
    """Returns the last entry of the plane of loop t, or of a loop before if none of its loops ran."""
    own = entries[(t - 1) % planes :: planes]
    return (own or entries)[-1]


# The entry of an earlier token that a later one reads at loop t (from 1), given the entries of the loops that it ran.
SEEN = {
    CacheStrategy.FULL: lambda entries, t: entries[min(t, len(entries)) - 1],
    CacheStrategy.LAST: lambda entries, t: entries[-1],
    CacheStrategy.AVERAGE: lambda entries, t: jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *entries),
    CacheStrategy.FIRST: lambda entries, t: entries[0],
    RING: _in_ring,
}


def decode(model, params, request, strategy, q):
    """Returns greedy tokens, their exit loops by `q`, and their log-probabilities."""
    cache, logits, gates = _read_prompt(model, params, request.prompt_ids)
    tokens, exit_loops, log_probs = [], [], []
    while True:
        exit_loop = next(t for t in range(1, model.config.loops + 1) if _leaves(gates[:t], q, model.config.loops))
        predicted = logits[exit_loop - 1].astype(np.float64)
        tokens.append(int(predicted.argmax()))
        exit_loops.append(exit_loop)
        log_probs.append(predicted.max() - np.log(np.exp(predicted).sum()))
        if len(tokens) == request.max_new_tokens:
            return tokens, exit_loops, log_probs
        entries, logits, gates = _run_token(model, params, tokens[-1], cache, strategy, q)
        cache.append(entries)


def _leaves(gates, q, loops):
    return len(gates) == loops or np.prod(1 / (1 + np.exp(np.array(gates, np.float64)))) <= 1 - q


def _run_token(model, params, token, cache, strategy, q):
    entries, logits, gates, state = [], [], [], np.zeros((1, 1, model.config.width), np.float32)
    while not gates or not _leaves(gates, q, model.config.loops):
        past = [SEEN[strategy](of_token, len(gates) + 1) for of_token in cache]
        past += [jax.tree.map(np.zeros_like, past[0])] * (ROOM - len(cache))
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves, axis=2), *past)
        state, own, predicted, gate = jax.device_get(
            _one_loop(model, params, np.int32(token), np.int32(len(cache)), state, np.int32(len(gates)), stacked)
        )
        entries.append(jax.tree.map(lambda x: x[:, :, 0], own))
        logits.append(predicted)
        gates.append(gate)
    return entries, logits, gates


@functools.partial(jax.jit, static_argnums=0)
def _one_loop(model, params, token, position, state, done, past):
    apply = functools.partial(model.apply, {"params": params})
    places = jnp.arange(ROOM)[None]
    one = jnp.ones((1, 1), jnp.int32)
    context = make_context(model.config, position[None, None], one, places, (places < position).astype(jnp.int32))
    embedded, prelude = apply(token[None, None], context, past.prelude, True, method="embed")
    state = jnp.where(done == 0, apply(embedded, method="initial_state"), state)
    output, core, coda = apply(state, embedded, context, done, past.core, past.coda, True, method="loop_step")
    own = ModelCache(core=core, prelude=prelude, coda=coda)
    return output.state, own, output.hidden[0, 0] @ head_matrix(params, model.config), output.gate_logits[0, 0]


def _read_prompt(model, params, prompt):
    """Returns the cache, a list of loops for each token, and the predictions and gates of the last token."""
    tokens = np.zeros((1, ROOM), np.int32)
    tokens[0, : len(prompt)] = prompt
    planes, logits, gates = jax.device_get(_prefill(model, params, tokens, np.int32(len(prompt) - 1)))

    def entry(place, loop):
        looped = jax.tree.map(lambda x: x[loop, :, :, place], dataclasses.replace(planes, prelude=None))
        return dataclasses.replace(looped, prelude=jax.tree.map(lambda x: x[:, :, place], planes.prelude))

    loops = range(model.config.loops)
    return [[entry(place, loop) for loop in loops] for place in range(len(prompt))], list(logits), list(gates)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model, params, tokens, last):
    output, planes = model.apply({"params": params}, tokens, method="prefill")
    return planes, output.hidden[:, 0, last] @ head_matrix(params, model.config), output.gate_logits[:, 0, last]
