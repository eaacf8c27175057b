"""One tick: a pass of the shared stack over all slots, each at its own loop and position.

Every loop has the same weights, so tokens at different loops share a pass. A slot whose token leaves has its next token
chosen in the same tick, and that token does its first loop in the next one, while the neighbours are at their third
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

from looplm_jax.halting.signals import Needs
from looplm_jax.inference.placing import settled
from looplm_jax.inference.sampling import Choice, likeliest, sample_rows
from looplm_jax.inference.slots import Slots
from looplm_jax.models.blocks import Context, KeyValues
from looplm_jax.models.looplm import LoopLM, ModelCache, Params, compute_dtype, head_matrix


@flax.struct.dataclass
class Ticked:
    """What a tick gave each slot; the other fields mean something where `exited`."""

    active: Bool[Array, "*N"]  # was at work
    exited: Bool[Array, "*N"]  # chose a token
    tokens: Int[Array, "*N"]
    log_probs: Float[Array, "*N"]  # of the token, at temperature 1, nats
    exit_loops: Int[Array, "*N"]  # the loop whose logits it was chosen from
    failed: Bool[Array, "*N"]  # logits were not finite: the request ends without this token
    finished: Bool[Array, "*N"]  # nothing follows: a stop token, the last one asked for, or a failure
    previews: Int[Array, "*N"] | None = None  # the likeliest token after this loop, also where none was chosen


@functools.partial(jax.jit, static_argnames=("model", "loops", "ticks", "previews"), donate_argnames=("slots",))
def run_ticks(
    model: LoopLM, params: Params, slots: Slots, *, loops: int, ticks: int = 1, previews: bool = False
) -> tuple[Slots, Ticked]:
    """`ticks` ticks in a row. The slots are donated: their cache is updated in place.

    Args:
      model: the network.
      params: its parameters.
      slots: requests under way.
      loops: the most loops of a token, T.
      ticks: passes of the stack.
      previews: whether every loop's prediction is wanted.

    Returns:
      The slots, and what each tick gave, with a leading axis of ticks.
    """

    def one(slots: Slots, _: None) -> tuple[Slots, Ticked]:
        return tick(model, params, slots, loops=loops, previews=previews)

    return jax.lax.scan(one, slots, length=ticks)


def tick(model: LoopLM, params: Params, slots: Slots, *, loops: int, previews: bool) -> tuple[Slots, Ticked]:
    """One pass of the shared stack. Pure; see `run_ticks`."""
    apply = bound(model, params)
    cache, done, dtype = slots.cache, slots.memory.loop, compute_dtype(model.compute)
    context = cache.context(model.config)
    embedded, prelude = _embed(apply, model, slots, context)
    first = (done == 0)[:, None, None]
    state = jnp.where(first, apply(embedded, method="initial_state"), slots.state)
    seen = cache.emptied(~slots.active)
    past = seen.past(cache.planes.core, done, dtype), seen.past(cache.planes.coda, done, dtype)
    output, core, coda = apply(state, embedded, context, *past, True, method="loop_step")
    hidden = output.hidden[:, 0]
    # What is not finite would harm the next request of the slot. That the write waits for the state, and so for all
    # that was read of the cache, is also what lets XLA update the cache in place.
    written = slots.active & jnp.isfinite(hidden).all(axis=-1)
    cache = cache.write(ModelCache(core=core, prelude=prelude, coda=coda), done, written)

    policy = slots.settings.policy
    logits = logits_of(model, params, hidden) if previews or Needs.LOGITS in policy.needs else None
    signals = slots.memory.observe(output.gate_logits[:, 0], hidden, logits)
    exited = slots.active & (policy.exits(signals) | (signals.loop >= jnp.minimum(loops, slots.ceiling)))
    ticked = dataclasses.replace(
        choose(model, params, slots, hidden, logits, exited),
        active=slots.active,
        exit_loops=signals.loop,
        previews=likeliest(logits, slots.settings.sampling) if previews and logits is not None else None,
    )
    memory = jax.tree.map(lambda new: _where(slots.active & ~exited, new, jnp.zeros_like(new)), signals.memory())
    slots = slots.replace(
        cache=cache.advance(exited.astype(jnp.int32)),
        state=output.state,
        embedded=None if slots.embedded is None else embedded,
        memory=memory,
        spent=slots.spent + jnp.where(exited, signals.loop, 0),
    )
    return settled((receive(slots, ticked), ticked))


def choose(
    model: LoopLM,
    params: Params,
    slots: Slots,
    hidden: Float[Array, "N D"],
    logits: Float[Array, "N V"] | None,
    exited: Bool[Array, "N"],
) -> Ticked:
    """A token for each slot that exited. Where none did, the head is not computed."""
    settings = slots.settings

    # Slots that choose nothing count as greedy: where all others are, nothing is drawn or cut.
    temperature = jnp.where(exited, settings.sampling.temperature, 0.0)
    sampling = dataclasses.replace(settings.sampling, temperature=temperature)

    def draw() -> tuple[Choice, Bool[Array, "N"]]:
        found = logits_of(model, params, hidden) if logits is None else logits
        return sample_rows(found, sampling, slots.made, slots.seen), ~jnp.isfinite(found).all(axis=-1)

    shapes = jax.eval_shape(draw)
    choice, broken = jax.lax.cond(jnp.any(exited), draw, lambda: jax.tree.map(jnp.zeros_like, shapes))
    failed = exited & broken
    stopped = jnp.any(choice.tokens[:, None] == settings.stop_ids, axis=-1) | (slots.made + 1 >= settings.limit)
    return Ticked(
        active=exited,
        exited=exited,
        tokens=choice.tokens,
        log_probs=choice.log_probs,
        exit_loops=jnp.zeros_like(choice.tokens),
        failed=failed,
        finished=failed | (exited & stopped),
    )


def receive(slots: Slots, ticked: Ticked) -> Slots:
    """The slots with their new tokens at work."""
    exited = ticked.exited
    seen = slots.seen
    if seen is not None:
        rows = jnp.arange(ticked.tokens.size)
        seen = seen.at[rows, jnp.where(exited, ticked.tokens, seen.shape[1])].set(True, mode="drop")
    return slots.replace(
        tokens=jnp.where(exited, ticked.tokens, slots.tokens),
        made=slots.made + exited.astype(jnp.int32),
        active=slots.active & ~ticked.finished,
        seen=seen,
    )


def bound(model: LoopLM, params: Params) -> Callable[..., Any]:
    """`model.apply` with these parameters."""
    return functools.partial(model.apply, {"params": params})


def logits_of(model: LoopLM, params: Params, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Predictions of states, float32."""
    head = head_matrix(params, model.config).astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def _embed(apply: Any, model: LoopLM, slots: Slots, context: Context) -> tuple[Float[Array, "N 1 D"], KeyValues | None]:
    """Embedded tokens. A prelude runs only in ticks where some token is new, and keeps what it said of the others."""
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
    return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)
