"""Prefill of prompts into slots: chunk after chunk, each through all T loops.

Sharing planes between loops while a prompt is read costs more than ten points on GSM8K (paper v4, section 5.4.2), so
the tokens of a prompt attend in each loop to that loop of one another. Chunks read and write the pages that the request
has reserved in place, where a full cache has the T planes that this takes. `_loopwise_prefill` reads a prompt into
a cache whose loops share planes, and `_packed_prefill` reads prompts that fit in one chunk.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.halting._distribution import log_exit_probability
from looplm_jax.halting._policy_table import exit_loops
from looplm_jax.inference._cache_layout import at_positions, constrain, store_heads
from looplm_jax.inference._kv_cache import Cache
from looplm_jax.inference._slots import Slots, SlotSettings, fresh_memory
from looplm_jax.inference._tick import Ticked, bound, choose, draws_of, logits_of, receive
from looplm_jax.models._looplm import LoopLM, ModelCache, Params, compute_dtype


@flax.struct.dataclass
class LastToken:
    """The outputs of all loops at the last token of a chunk."""

    hidden: Float[Array, "T D"]
    state: Float[Array, "T D"]  # before the coda
    gate_logits: Float[Array, "T"]


@flax.struct.dataclass
class Place:
    """The slot of a request, its pages, padded to those of the longest row, and the number of its tokens in them."""

    slot: Int[Array, ""]
    pages: Int[Array, "W"]
    length: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def prefill_chunk(
    model: LoopLM, params: Params, row: Cache, tokens: Int[Array, "S"], count: Int[Array, ""]
) -> tuple[Cache, LastToken]:
    """Appends the first `count` of `tokens` to a row, after as many loops as it has planes.

    A chunk whose last state is not finite is not written: the next owner of a page must find finite numbers.

    Args:
      model: the network.
      params: its parameters.
      row: the tokens before the chunk; donated. It needs room for `count` more.
      tokens: a chunk, padded on the right to a static size; the contents of the padding have no effect.
      count: the number of tokens that are not padding, at least 1.

    Returns:
      The longer row, and the outputs at the last token of the chunk.
    """
    # Runs once, before the loops.
    apply = bound(model, params)
    dtype, size = compute_dtype(model.compute), tokens.size
    context = row.context(model.config, size)
    embedded, prelude = apply(tokens[None], context, row.past_prelude(dtype), True, method="embed")

    def loop(state: Float[Array, "1 S D"], plane: Int[Array, ""]) -> tuple[Array, PyTree]:
        past = row.past(row.planes.core, plane[None], dtype), row.past(row.planes.coda, plane[None], dtype)
        output, core, coda = apply(state, embedded, context, plane, *past, True, method="loop_step")
        last = LastToken(
            hidden=output.hidden[0, count - 1],
            state=output.state[0, count - 1],
            gate_logits=output.gate_logits[0, count - 1],
        )
        return output.state, (last, core, coda)

    start = apply(embedded, method="initial_state")
    _, (last, core, coda) = jax.lax.scan(loop, start, jnp.arange(row.depth))
    # This test makes the write wait for all loops, and so for all reads of the row: XLA can then update it in place.
    finite = jnp.isfinite(last.hidden).all()

    # The scan stacks loops in front, [T, L, ...]; the cache has layers first. A prelude gets an axis of one plane.
    core, coda = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (core, coda))
    own = ModelCache(core=core, prelude=jax.tree.map(lambda x: x[:, None], prelude), coda=coda)
    numbers = jnp.arange(size)

    # Padding comes after the `count` tokens, and is not written.
    written = append(row, own, jnp.zeros_like(numbers), row.lengths[0] + numbers, (numbers < count) & finite)
    return constrain((written.advance(count[None]), last))


def append(
    cache: Cache,
    own: ModelCache,
    rows: Int[ArrayLike, "S"],
    positions: Int[ArrayLike, "S"],
    written: Bool[Array, "S"],
) -> Cache:
    """Returns a cache with the keys and values `[L, P, 1, S, K, Dh]` of tokens, except those not `written`."""
    put = writer(cache, jnp.asarray(rows), jnp.asarray(positions), written)
    return dataclasses.replace(cache, planes=jax.tree.map(put, cache.planes, own))


def writer(
    cache: Cache, rows: Int[Array, "S"], positions: Int[Array, "S"], written: Bool[Array, "S"]
) -> Callable[[Array, Array], Array]:
    """Returns a function that writes S tokens, except those not `written`, to one array of keys or values."""
    # Page M does not exist, so writes to it are dropped.
    pages, offsets = cache.places(rows, positions)
    pages = jnp.where(written, pages, cache.pages)

    def put(whole: Float[Array, "L P M c R W"], new: Float[Array, "L P 1 S K Dh"]) -> Float[Array, "L P M c R W"]:
        stored = store_heads(new[:, :, 0], whole.shape).astype(whole.dtype)
        return at_positions(whole, slice(None), slice(None), pages, offsets).set(stored, mode="drop")

    return put


@jax.jit
def after_chunk(before: LastToken, last: LastToken) -> LastToken:
    """Returns `last`, set to NaN if the previous chunk was not finite, and was therefore not written."""
    # NaN is how a failure travels: the first token of the request is then not finite, and ends it.
    finite = jnp.isfinite(before.hidden).all()
    return constrain(dataclasses.replace(last, hidden=jnp.where(finite, last.hidden, jnp.nan)))


@functools.partial(jax.jit, donate_argnames=("row",))
def fill_pages(row: Cache, past: Cache) -> Cache:
    """Returns a row of pages with the tokens of a row of one page. The row of pages is donated."""
    # The past may have been kept by an engine with another page size or dtype.
    size, pages = row.page_size, row.page_table[0]
    used = min(-(-past.capacity // size), pages.size)

    def put(whole: Float[Array, "L P M c R W"], own: Float[Array, "L P 1 C R W"]) -> Float[Array, "L P M c R W"]:
        own = _resized(own, used * size)
        paged = own.reshape(*own.shape[:2], used, size, *own.shape[4:]).astype(whole.dtype)
        return whole.at[:, :, pages[:used]].set(paged, mode="drop")

    return constrain(dataclasses.replace(row, planes=jax.tree.map(put, row.planes, past.planes)))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("slots",))
def admit(
    model: LoopLM,
    params: Params,
    slots: Slots,
    last: LastToken,
    place: Place,
    settings: SlotSettings,
    prompt_seen: Array | None,
) -> tuple[Slots, Ticked]:
    """Puts a request whose prompt is in its pages into a slot, and chooses its first token.

    Args:
      model: the network.
      params: its parameters.
      slots: the running requests; donated.
      last: the outputs of all loops at the last token of the prompt.
      place: the slot and the pages of the request.
      settings: the settings of the request, without the axis N.
      prompt_seen: a mask of the tokens of the prompt, `[V]`, or None if no slot has a repetition penalty.

    Returns:
      The slots, and the first token, repeated in the entries of all slots.
    """
    # A single slot, so that the functions of a tick choose and receive the token.
    one = Slots(
        cache=slots.cache,
        tokens=jnp.zeros(1, jnp.int32),
        state=jnp.zeros_like(slots.state[:1]),
        embedded=None if slots.embedded is None else jnp.zeros_like(slots.embedded[:1]),
        memory=fresh_memory(model, slots.settings.policy, 1),
        num_generated=jnp.zeros(1, jnp.int32),
        loops_used=jnp.zeros(1, jnp.int32),
        active=jnp.ones(1, bool),
        settings=jax.tree.map(lambda x: jnp.asarray(x)[None], settings),
        seen_tokens=None if prompt_seen is None else prompt_seen[None],
    )

    # The exit of the first token is chosen afterwards, from the outputs of all loops, which the prompt ran anyway.
    exits = exit_loops(
        settings.policy,
        last.hidden[:, None],
        last.gate_logits[:, None],
        functools.partial(logits_of, model, params),
        draws_of(one, settings.policy),
        last.state[:, None],
    )

    first = choose(model, params, one, last.hidden[exits[0] - 1][None], None, one.active)
    exit_log_probs = log_exit_probability(last.gate_logits[:, None], exits)
    first = dataclasses.replace(first, exit_loops=exits, exit_log_probs=exit_log_probs)
    one = receive(one, first)

    # The cache is shared by all slots: only the length and the pages of this one change.
    cache = slots.cache
    cache = dataclasses.replace(
        cache,
        lengths=cache.lengths.at[place.slot].set(place.length),
        table=cache.page_table.at[place.slot].set(place.pages),
    )

    rest = jax.tree.map(
        lambda whole, own: jax.lax.dynamic_update_index_in_dim(whole, own[0].astype(whole.dtype), place.slot, axis=0),
        slots.replace(cache=None),
        one.replace(cache=None),
    )

    first = jax.tree.map(lambda x: jnp.broadcast_to(x, slots.tokens.shape), first)
    return constrain((rest.replace(cache=cache), first))


@functools.partial(jax.jit, static_argnames=("capacity",))
def extract_row(cache: Cache, slot: Int[Array, ""], *, capacity: int) -> Cache:
    """Returns a copy of the row of a slot, as one page, for a request that continues it.

    `capacity` is at least the number of tokens of the slot, and may exceed the capacity of the slots.
    """
    # Ceiling division: the pages that have these positions.
    used = min(-(-capacity // cache.page_size), cache.page_table.shape[1])
    pages = jax.lax.dynamic_index_in_dim(cache.page_table, slot, keepdims=False)[:used]

    def take(whole: Float[Array, "L P M c R W"]) -> Float[Array, "L P 1 C R W"]:
        own = whole.at[:, :, pages].get(mode="clip")
        return _resized(own.reshape(*own.shape[:2], 1, -1, *own.shape[4:]), capacity)

    return dataclasses.replace(
        cache,
        planes=jax.tree.map(take, cache.planes),
        lengths=jax.lax.dynamic_slice_in_dim(cache.lengths, slot, 1),
        table=None,
    )


def _resized(row: Float[Array, "L P 1 C R W"], capacity: int) -> Float[Array, "L P 1 c R W"]:
    """Returns the first `capacity` positions of a row, with zeros after them if it has fewer."""
    kept = row[:, :, :, :capacity]
    return jnp.pad(kept, [(0, capacity - kept.shape[3]) if axis == 3 else (0, 0) for axis in range(6)])
