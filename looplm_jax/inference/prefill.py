"""Prompts into slots: chunk after chunk through all T loops, in a row of their own, which then becomes a slot.

Sharing planes between loops while a prompt is read costs more than ten points on GSM8K (paper v4, section 5.4.2), so a
row always has T planes; a slot keeps of them what its cache keeps.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from looplm_jax.halting.first_exit import exit_loops
from looplm_jax.inference.kv_cache import Cache, CacheStrategy, empty_cache, share, unshare
from looplm_jax.inference.placing import settled
from looplm_jax.inference.slots import Settings, Slots, fresh_memory
from looplm_jax.inference.tick import Ticked, bound, choose, logits_of, receive
from looplm_jax.models.looplm import LoopLM, ModelCache, Params, compute_dtype


@flax.struct.dataclass
class LastToken:
    """What all loops say of the last token of a chunk."""

    hidden: Float[Array, "T D"]
    gate_logits: Float[Array, "T"]


def empty_row(model: LoopLM, *, capacity: int, loops: int, dtype: DTypeLike) -> Cache:
    """The cache of one prompt, with a plane for each loop."""
    return empty_cache(model.config, CacheStrategy.FULL, rows=1, capacity=capacity, loops=loops, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def prefill_chunk(
    model: LoopLM, params: Params, row: Cache, tokens: Int[Array, "S"], count: Int[Array, ""]
) -> tuple[Cache, LastToken]:
    """Append the first `count` of `tokens` to a row, through as many loops as it has planes.

    Args:
      model: the network.
      params: its parameters.
      row: what came before; donated. There must be room for S tokens.
      tokens: a chunk, padded on the right to a static size; what stands in the padding has no influence.
      count: tokens of it, at least 1.
    """
    apply = bound(model, params)
    dtype, size = compute_dtype(model.compute), tokens.size
    context = row.context(model.config, size)
    embedded, prelude = apply(tokens[None], context, row.past_prelude(dtype), True, method="embed")

    def loop(state: Float[Array, "1 S D"], plane: Int[Array, ""]) -> tuple[Array, PyTree]:
        past = row.past(row.planes.core, plane[None], dtype), row.past(row.planes.coda, plane[None], dtype)
        output, core, coda = apply(state, embedded, context, *past, True, method="loop_step")
        last = LastToken(hidden=output.hidden[0, count - 1], gate_logits=output.gate_logits[0, count - 1])
        return output.state, (last, core, coda)

    start = apply(embedded, method="initial_state")
    _, (last, core, coda) = jax.lax.scan(loop, start, jnp.arange(row.depth))
    # Of a prompt that fails nothing is wanted. That the write waits for all loops, and so for all that was read of the
    # prelude, is what lets XLA update it in place.
    sound = jnp.isfinite(last.hidden).all()
    prelude = jax.tree.map(lambda x: jnp.where(sound, x, 0), prelude)
    return settled((_append(row, ModelCache(core=core, prelude=prelude, coda=coda), count), last))


def _append(row: Cache, own: ModelCache, count: Int[Array, ""]) -> Cache:
    def put(whole: Float[Array, "L P 1 C K Dh"], new: Float[Array, "P L 1 S K Dh"]) -> Float[Array, "L P 1 C K Dh"]:
        start = (0, 0, 0, row.lengths[0], 0, 0)
        return jax.lax.dynamic_update_slice(whole, jnp.swapaxes(new, 0, 1).astype(whole.dtype), start)

    prelude = jax.tree.map(lambda x: x[None], own.prelude)
    planes = jax.tree.map(put, row.planes, dataclasses.replace(own, prelude=prelude))
    return dataclasses.replace(row, planes=planes, lengths=row.lengths + count)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def admit(
    model: LoopLM,
    params: Params,
    slots: Slots,
    row: Cache,
    last: LastToken,
    slot: Int[Array, ""],
    settings: Settings,
    prompt_seen: Array | None,
) -> tuple[Slots, Ticked]:
    """Put a prefilled prompt into a slot, and choose its first token.

    Args:
      model: the network.
      params: its parameters.
      slots: requests under way; donated.
      row: the cache of the prompt; may have more capacity than a slot, if its tokens fit.
      last: what the loops say of its last token.
      slot: where to put it.
      settings: of this request, without the axis N.
      prompt_seen: tokens of the prompt, `[V]`, where slots remember them.

    Returns:
      The slots, and the first token as fields without axes.
    """
    exits = exit_loops(
        settings.policy,
        last.hidden[:, None],
        last.gate_logits[:, None],
        functools.partial(logits_of, model, params),
    )
    one = Slots(
        cache=share(row, slots.cache.strategy),
        tokens=jnp.zeros(1, jnp.int32),
        state=jnp.zeros_like(slots.state[:1]),
        embedded=None if slots.embedded is None else jnp.zeros_like(slots.embedded[:1]),
        memory=fresh_memory(model, slots.settings.policy, 1),
        made=jnp.zeros(1, jnp.int32),
        spent=jnp.zeros(1, jnp.int32),
        active=jnp.ones(1, bool),
        settings=jax.tree.map(lambda x: jnp.asarray(x)[None], settings),
        seen=None if prompt_seen is None else prompt_seen[None],
    )
    first = choose(model, params, one, last.hidden[exits[0] - 1][None], None, one.active)
    first = dataclasses.replace(first, exit_loops=exits)
    one = receive(one, first)
    # Whoever has the slot next must not find there what is not finite.
    sound = jax.tree.map(lambda x: jnp.where(first.failed[0], 0, x), one.cache)
    cache = _insert(slots.cache, sound, slot)
    rest = jax.tree.map(
        lambda whole, own: jax.lax.dynamic_update_index_in_dim(whole, own[0].astype(whole.dtype), slot, axis=0),
        slots.replace(cache=None),
        one.replace(cache=None),
    )
    return settled((rest.replace(cache=cache), jax.tree.map(lambda x: x[0], first)))


def _insert(cache: Cache, row: Cache, slot: Int[Array, ""]) -> Cache:
    def put(whole: Float[Array, "L P N C K Dh"], own: Float[Array, "L P 1 c K Dh"]) -> Float[Array, "L P N C K Dh"]:
        fitting = own[:, :, :, : whole.shape[3]].astype(whole.dtype)
        return jax.lax.dynamic_update_slice(whole, fitting, (0, 0, slot, 0, 0, 0))

    planes = jax.tree.map(put, cache.planes, row.planes)
    return dataclasses.replace(cache, planes=planes, lengths=cache.lengths.at[slot].set(row.lengths[0]))


@functools.partial(jax.jit, static_argnames=("loops", "capacity"))
def extract_row(cache: Cache, slot: Int[Array, ""], *, loops: int, capacity: int) -> Cache:
    """The row of a slot, to go on from with more text: the one plane of a shared cache stands in for all loops.

    `capacity` is at least the tokens of the slot; it may be more or less than the capacity of the slots.
    """

    def take(whole: Float[Array, "L P N C K Dh"]) -> Float[Array, "L P 1 c K Dh"]:
        own = jax.lax.dynamic_slice_in_dim(whole, slot, 1, axis=2)[:, :, :, :capacity]
        return jnp.pad(own, [(0, capacity - own.shape[3]) if axis == 3 else (0, 0) for axis in range(6)])

    lengths = jax.lax.dynamic_slice_in_dim(cache.lengths, slot, 1)
    return unshare(dataclasses.replace(cache, planes=jax.tree.map(take, cache.planes), lengths=lengths), loops)


@functools.partial(jax.jit, static_argnames=("capacity",))
def widen_row(row: Cache, *, capacity: int) -> Cache:
    """A copy of a row with room for `capacity` tokens, no fewer than it has."""

    def widen(whole: Float[Array, "L P 1 c K Dh"]) -> Float[Array, "L P 1 C K Dh"]:
        return jnp.pad(whole, [(0, capacity - whole.shape[3]) if axis == 3 else (0, 0) for axis in range(6)])

    return dataclasses.replace(row, planes=jax.tree.map(widen, row.planes))
