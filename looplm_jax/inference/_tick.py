"""One tick: a pass of the shared stack over all slots, each at its own loop and position.

Every loop has the same weights, so tokens at different loops share a pass. If the token of a slot exits, its next token
is chosen in the same tick, and runs its first loop in the next one, while other slots may be at their third loop
("continuous depth batching", arXiv 2608.09444).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.halting.signals import Needs
from looplm_jax.inference._cache_layout import constrain
from looplm_jax.inference._sampling import Choice, exit_draws, likeliest, sample_rows
from looplm_jax.inference._slots import Slots
from looplm_jax.models._blocks import Context, KeyValues
from looplm_jax.models._looplm import LoopLM, ModelCache, Params, compute_dtype, head_matrix


@flax.struct.dataclass
class Ticked:
    """The results of a tick for each slot; fields after `exited` are valid where it is set."""

    active: Bool[Array, "*N"]  # was running
    exited: Bool[Array, "*N"]  # exited, and chose its next token
    tokens: Int[Array, "*N"]
    log_probs: Float[Array, "*N"]  # of the token, at temperature 1, nats
    exit_loops: Int[Array, "*N"]  # the loop whose logits it was chosen from
    exit_log_probs: Float[Array, "*N"]  # of that loop in the exit distribution, nats
    failed: Bool[Array, "*N"]  # logits were not finite: the request ends without this token
    finished: Bool[Array, "*N"]  # nothing follows: a stop token, the last requested one, or a failure
    previews: Int[Array, "*N"] | None = None  # most probable token after this loop, also without an exit


@functools.partial(jax.jit, static_argnames=("model", "loops", "ticks", "previews"), donate_argnames=("slots",))
def run_ticks(
    model: LoopLM, params: Params, slots: Slots, *, loops: int, ticks: int = 1, previews: bool = False
) -> tuple[Slots, Ticked]:
    """Runs `ticks` ticks. The slots are donated, so that their cache is updated in place.

    Args:
      model: the network.
      params: its parameters.
      slots: running requests.
      loops: the maximum number of loops per token, T.
      ticks: the number of passes of the stack.
      previews: whether to return the prediction of every loop.

    Returns:
      The slots, and the results of each tick, with a leading axis of ticks.
    """

    def one(slots: Slots, _: None) -> tuple[Slots, Ticked]:
        return tick(model, params, slots, loops=loops, previews=previews)

    # A scan, so that several ticks are one program, between which the host need not act.
    return jax.lax.scan(one, slots, length=ticks)


def tick(model: LoopLM, params: Params, slots: Slots, *, loops: int, previews: bool) -> tuple[Slots, Ticked]:
    """Runs one pass of the shared stack. Pure; see `run_ticks`."""
    apply = bound(model, params)
    cache, done, dtype = slots.cache, slots.memory.loop, compute_dtype(model.compute)
    context = cache.context(model.config)
    embedded, prelude = _embed(apply, model, slots, context)
    # Tokens before their first loop start from their embedding.
    first = (done == 0)[:, None, None]
    state = jnp.where(first, apply(embedded, method="initial_state"), slots.state)
    # Inactive slots read nothing of the cache.
    seen = cache.emptied(~slots.active)
    past = seen.past(cache.planes.core, done, dtype), seen.past(cache.planes.coda, done, dtype)

    # Every slot runs its own next loop; they differ only in the planes that they read.
    output, core, coda = apply(state, embedded, context, done, *past, True, method="loop_step")
    # [N, 1, D] -> [N, D]
    hidden = output.hidden[:, 0]

    # Values that are not finite would harm the next request of the slot. Because of this test the write waits for the
    # state, and so for all reads of the cache, which also lets XLA update the cache in place.
    written = slots.active & jnp.isfinite(hidden).all(axis=-1)
    cache = cache.write(ModelCache(core=core, prelude=prelude, coda=coda), done, written)

    policy = slots.settings.policy
    # The head is costly, so predictions are computed only if a policy or a preview needs them.
    logits = logits_of(model, params, hidden) if previews or Needs.LOGITS in policy.needs else None
    draws = draws_of(slots, policy)
    signals = slots.memory.observe(output.gate_logits[:, 0], hidden, logits, draws, output.state[:, 0])
    # log lambda of this loop. A token at the last loop leaves whatever the gate is.
    gate_open = jax.nn.log_sigmoid(signals.gate_logits)
    # The budget and T limit every policy.
    exited = slots.active & (policy.exits(signals) | (signals.loop >= jnp.minimum(loops, slots.max_loops)))

    ticked = dataclasses.replace(
        choose(model, params, slots, hidden, logits, exited),
        active=slots.active,
        exit_loops=signals.loop,
        exit_log_probs=slots.memory.log_survival + jnp.where(signals.loop < loops, gate_open, 0.0),
        previews=likeliest(logits, slots.settings.sampling) if previews and logits is not None else None,
    )

    # A token that exits leaves no memory to the next token of the slot.
    memory = jax.tree.map(lambda new: _where(slots.active & ~exited, new, jnp.zeros_like(new)), signals.memory())
    slots = slots.replace(
        cache=cache.advance(exited.astype(jnp.int32)),
        state=output.state,
        embedded=None if slots.embedded is None else embedded,
        memory=memory,
        loops_used=slots.loops_used + jnp.where(exited, signals.loop, 0),
    )
    return constrain((receive(slots, ticked), ticked))


# Choosing tokens


def draws_of(slots: Slots, policy: PolicyTable) -> Float[Array, "N"] | None:
    """Returns the random numbers that decide the exits of the running tokens, or None if no policy is random."""
    if Needs.DRAW not in policy.needs:
        return None
    # The token that is chosen at the exit has the next number.
    return exit_draws(slots.settings.sampling, slots.num_generated)


def choose(
    model: LoopLM,
    params: Params,
    slots: Slots,
    hidden: Float[Array, "N D"],
    logits: Float[Array, "N V"] | None,
    exited: Bool[Array, "N"],
) -> Ticked:
    """Chooses a token for each slot that exited. If none did, the head is not computed."""
    settings = slots.settings

    # Slots that choose nothing count as greedy: if all others are, nothing is drawn or filtered.
    temperature = jnp.where(exited, settings.sampling.temperature, 0.0)
    sampling = dataclasses.replace(settings.sampling, temperature=temperature)

    def draw() -> tuple[Choice, Bool[Array, "N"]]:
        found = logits_of(model, params, hidden) if logits is None else logits
        return sample_rows(found, sampling, slots.num_generated, slots.seen_tokens), ~jnp.isfinite(found).all(axis=-1)

    # Both branches of cond must return the same structure.
    shapes = jax.eval_shape(draw)
    choice, broken = jax.lax.cond(jnp.any(exited), draw, lambda: jax.tree.map(jnp.zeros_like, shapes))

    failed = exited & broken
    # The limit counts the token that was just chosen.
    at_limit = slots.num_generated + 1 >= settings.limit
    stopped = jnp.any(choice.tokens[:, None] == settings.stop_ids, axis=-1) | at_limit
    return Ticked(
        active=exited,
        exited=exited,
        tokens=choice.tokens,
        log_probs=choice.log_probs,
        exit_loops=jnp.zeros_like(choice.tokens),
        exit_log_probs=jnp.zeros_like(choice.log_probs),
        failed=failed,
        finished=failed | (exited & stopped),
    )


def receive(slots: Slots, ticked: Ticked) -> Slots:
    """Returns the slots with their new tokens running."""
    exited = ticked.exited
    seen = slots.seen_tokens
    if seen is not None:
        rows = jnp.arange(ticked.tokens.size)
        # Slots without a new token write to the index V, which is out of bounds, and dropped.
        seen = seen.at[rows, jnp.where(exited, ticked.tokens, seen.shape[1])].set(True, mode="drop")

    return slots.replace(
        tokens=jnp.where(exited, ticked.tokens, slots.tokens),
        num_generated=slots.num_generated + exited.astype(jnp.int32),
        active=slots.active & ~ticked.finished,
        seen_tokens=seen,
    )


# Applying the model


def bound(model: LoopLM, params: Params) -> Callable[..., Any]:
    """Returns `model.apply` with these parameters bound."""
    return functools.partial(model.apply, {"params": params})


def logits_of(model: LoopLM, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns the float32 logits of states."""
    # The engine holds the head in this dtype already; for other callers the cast is part of the program.
    head = head_matrix(params, model.config).astype(hidden.dtype)
    # Products in the dtype of the states, sums in float32.
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _embed(apply: Any, model: LoopLM, slots: Slots, context: Context) -> tuple[Float[Array, "N 1 D"], KeyValues | None]:
    """Returns embedded tokens. A prelude runs only in ticks with a new token, and keeps its output for the others."""
    tokens = slots.tokens[:, None]
    if slots.embedded is None:
        return apply(tokens, context, method="embed")
    past = slots.cache.emptied(~slots.active).past_prelude(compute_dtype(model.compute))

    def run() -> PyTree:
        return apply(tokens, context, past, True, method="embed")

    _, own = jax.eval_shape(run)
    new = slots.active & (slots.memory.loop == 0)
    zeros = jax.tree.map(jnp.zeros_like, own)  # written nowhere: no slot is new
    embedded, prelude = jax.lax.cond(jnp.any(new), run, lambda: (slots.embedded, zeros))
    return _where(new, embedded, slots.embedded), prelude


def _where(rows: Bool[Array, "N"], new: Array, old: Array) -> Array:
    """Selects entire rows."""
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
