"""Prompts that fit one chunk together, read by one program, which also chooses the first token of each.

They stand one behind the other, and no token sees those of another prompt. Of all loops the cache keeps what it keeps,
at once: nothing is read of the cache, so a prompt needs no row of its own.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.halting.first_exit import exit_loops
from looplm_jax.inference.kv_cache import Cache, CacheStrategy, share
from looplm_jax.inference.placing import settled
from looplm_jax.inference.prefill import LastToken, append
from looplm_jax.inference.slots import Settings, Slots, fresh_memory
from looplm_jax.inference.tick import Ticked, bound, choose, logits_of, receive
from looplm_jax.models.blocks import make_context
from looplm_jax.models.looplm import LoopLM, ModelCache, Params


@flax.struct.dataclass
class Pack:
    """S tokens of prompts, and the slot that each prompt is for. Fields of slots without a prompt mean nothing."""

    tokens: Int[Array, "S"]
    owners: Int[Array, "S"]  # the slot of each token; N in the padding
    positions: Int[Array, "S"]
    lengths: Int[Array, "N"]  # tokens of the prompt of each slot; 0 where there is none
    ends: Int[Array, "N"]  # where in the pack its last token is
    pages: Int[Array, "N W"]
    settings: Settings
    seen: Bool[Array, "N V"] | None  # tokens of each prompt, where slots remember them


def make_pack(prompts: Mapping[int, Sequence[int]], *, slots: int, size: int, **of_slots: Any) -> Pack:
    """Returns the prompts of some of N slots in an array of `size` tokens; `of_slots` are the other fields of a pack.

    All arrays are NumPy's.
    """
    tokens, positions, owners = np.zeros(size, np.int32), np.zeros(size, np.int32), np.full(size, slots, np.int32)
    lengths, ends = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
    start = 0
    for slot, prompt in prompts.items():
        span = slice(start, start + len(prompt))
        tokens[span], positions[span], owners[span] = prompt, np.arange(len(prompt)), slot
        lengths[slot], ends[slot] = len(prompt), span.stop - 1
        start = span.stop
    of_slots |= {"lengths": lengths, "ends": ends}
    return Pack(**{"tokens": tokens, "owners": owners, "positions": positions} | of_slots)


@functools.partial(jax.jit, static_argnames=("model", "loops"), donate_argnames=("slots",))
def admit_pack(model: LoopLM, params: Params, slots: Slots, pack: Pack, *, loops: int) -> tuple[Slots, Ticked]:
    """Read the prompts of a pack through all loops, put each into its slot, and choose its first token.

    A prompt whose numbers are not finite may spoil the others: zero times infinity is no number. All that come out
    that way have failed, and are to be read again alone. Nothing is written of them.

    Returns:
      The slots, which are donated, and the first tokens, as a tick gives tokens, of the slots that the prompts are for.
    """
    new = pack.lengths > 0
    last, own = _read(model, params, pack, loops)
    sound = jnp.isfinite(last.hidden).all(axis=(0, 2)).at[pack.owners].get(mode="fill", fill_value=False)
    cache = dataclasses.replace(
        slots.cache,
        lengths=jnp.where(new, pack.lengths, slots.cache.lengths),
        table=_where(new, pack.pages, slots.cache.page_table),
    )
    kept = share(Cache(planes=own, lengths=cache.lengths, strategy=CacheStrategy.FULL), cache.strategy).planes
    cache = append(cache, kept, pack.owners, pack.positions, sound)
    begun = jax.tree.map(
        lambda old, fresh: _where(new, fresh, old),
        slots.replace(cache=None),
        slots.replace(
            cache=None,
            state=jnp.zeros_like(slots.state),
            embedded=None if slots.embedded is None else jnp.zeros_like(slots.embedded),
            memory=fresh_memory(model, slots.settings.policy, new.size),
            made=jnp.zeros_like(slots.made),
            spent=jnp.zeros_like(slots.spent),
            active=jnp.ones_like(slots.active),
            settings=pack.settings,
            seen=pack.seen,
        ),
    ).replace(cache=cache)
    head = functools.partial(logits_of, model, params)
    exits = exit_loops(begun.settings.policy, last.hidden, last.gate_logits, head)
    hidden = last.hidden[exits - 1, jnp.arange(new.size)]
    first = dataclasses.replace(choose(model, params, begun, hidden, None, new), exit_loops=exits)
    return settled((receive(begun, first), first))


def _read(model: LoopLM, params: Params, pack: Pack, loops: int) -> tuple[LastToken, ModelCache]:
    """What all loops say of the last token of each slot's prompt, `[T, N, ...]`, and the keys and values of all."""
    apply = bound(model, params)
    padding = pack.lengths.size
    segments = jnp.where(pack.owners == padding, 0, pack.owners + 1)
    context = make_context(model.config, pack.positions[None], segments[None])
    embedded, prelude = apply(pack.tokens[None], context, None, True, method="embed")

    def loop(state: Float[Array, "1 S D"], _: None) -> tuple[Array, PyTree]:
        output, core, coda = apply(state, embedded, context, None, None, True, method="loop_step")
        last = LastToken(hidden=output.hidden[0, pack.ends], gate_logits=output.gate_logits[0, pack.ends])
        return output.state, (last, core, coda)

    _, (last, *own) = jax.lax.scan(loop, apply(embedded, method="initial_state"), length=loops)
    core, coda = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), own)
    return last, ModelCache(core=core, prelude=jax.tree.map(lambda x: x[:, None], prelude), coda=coda)


def _where(rows: Bool[Array, "N"], new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)
