"""Packed prefill: one program runs several prompts through all T loops and samples the first token of each.

The prompts of a pack follow one another in one sequence, and attention stays within each. Nothing is read from the
cache, so that also the keys and values of a shared cache (paper v4, section 5.4.2) are computed from all T planes and
written once.
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

from looplm_jax.halting._distribution import log_exit_probability
from looplm_jax.halting._policy_table import exit_loops
from looplm_jax.inference._cache_layout import constrain
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._kv_cache import Cache, share
from looplm_jax.inference._prefill import LastToken, append
from looplm_jax.inference._slots import Slots, SlotSettings, fresh_memory
from looplm_jax.inference._tick import Ticked, bound, choose, draws_of, logits_of, receive
from looplm_jax.models._blocks import Context, KeyValues, make_context
from looplm_jax.models._looplm import LoopLM, ModelCache, Params

_MOST_SIZES = 8  # of packs, and so programs that are compiled
_SMALLEST_STEP = 64  # tokens between two sizes
_BLOCK = 128  # queries whose scores exist at one time
_MOST_BLOCKS = 16  # blocks of queries in a program


@flax.struct.dataclass
class Pack:
    """S tokens of prompts, and what the N slots need to know of them. Entries of slots without a prompt are ignored."""

    tokens: Int[Array, "S"]
    owners: Int[Array, "S"]  # the slot of each token; N in the padding
    positions: Int[Array, "S"]  # in its prompt
    lengths: Int[Array, "N"]  # tokens of the prompt of each slot; 0: the slot gets none
    ends: Int[Array, "N"]  # index in the pack of the last token of each prompt
    pages: Int[Array, "N W"]
    settings: SlotSettings
    seen_tokens: Bool[Array, "N V"] | None  # tokens of each prompt, for repetition penalties


def pack_size(tokens: int, chunk: int) -> int:
    """Returns the static size of a pack of `tokens` tokens: a multiple of an eighth of `chunk`, and of 64 at least."""
    step = max(_SMALLEST_STEP, -(-chunk // _MOST_SIZES))
    return min(-(-tokens // step) * step, chunk)


def make_pack(prompts: Mapping[int, Sequence[int]], *, slots: int, size: int, **of_slots: Any) -> Pack:
    """Returns a pack of `size` tokens as NumPy arrays.

    Args:
      prompts: the prompt of each slot that gets one.
      slots: how many slots there are, N.
      size: tokens with padding, S.
      **of_slots: the fields `pages`, `settings` and `seen_tokens` of the pack.
    """
    tokens, positions, owners = np.zeros(size, np.int32), np.zeros(size, np.int32), np.full(size, slots, np.int32)
    lengths, ends = np.zeros(slots, np.int32), np.zeros(slots, np.int32)

    # Prompts are concatenated; padding belongs to slot N, which does not exist.
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
    """Runs the prompts of a pack through all loops, puts each into its slot, and samples its first token.

    A prompt whose values are not finite can make those of the others not finite: a masked weight is zero, and zero
    times infinity is not a number. Nothing of such prompts is written, and they are marked as failed; the caller runs
    each of them alone.

    Returns:
      The slots (the argument is donated), and the first tokens in the entries of the slots that got a prompt.
    """
    new = pack.lengths > 0
    last, own = _run(model, params, pack, loops)
    finite = jnp.isfinite(last.hidden).all(axis=(0, 2)).at[pack.owners].get(mode="fill", fill_value=False)
    cache = dataclasses.replace(
        slots.cache,
        lengths=jnp.where(new, pack.lengths, slots.cache.lengths),
        table=_where(new, pack.pages, slots.cache.page_table),
    )

    # What the strategy keeps of the prompts, written to their pages.
    kept = share(Cache(planes=own, lengths=cache.lengths, strategy=CacheStrategy.FULL), cache.strategy).planes
    cache = append(cache, kept, pack.owners, pack.positions, finite)

    # Slots with a new prompt start from an empty state; the others are unchanged.
    started = jax.tree.map(
        lambda old, fresh: _where(new, fresh, old),
        slots.replace(cache=None),
        slots.replace(
            cache=None,
            state=jnp.zeros_like(slots.state),
            embedded=None if slots.embedded is None else jnp.zeros_like(slots.embedded),
            memory=fresh_memory(model, slots.settings.policy, new.size),
            num_generated=jnp.zeros_like(slots.num_generated),
            loops_used=jnp.zeros_like(slots.loops_used),
            active=jnp.ones_like(slots.active),
            settings=pack.settings,
            seen_tokens=pack.seen_tokens,
        ),
    ).replace(cache=cache)

    head = functools.partial(logits_of, model, params)
    policy = started.settings.policy
    exits = exit_loops(policy, last.hidden, last.gate_logits, head, draws_of(started, policy), last.state)
    hidden = last.hidden[exits - 1, jnp.arange(new.size)]
    first = dataclasses.replace(
        choose(model, params, started, hidden, None, new),
        exit_loops=exits,
        exit_log_probs=log_exit_probability(last.gate_logits, exits),
    )
    return constrain((receive(started, first), first))


def _run(model: LoopLM, params: Params, pack: Pack, loops: int) -> tuple[LastToken, ModelCache]:
    """Returns the output of each loop at the last token of each prompt, `[T, N, ...]`, and all keys and values."""
    apply = bound(model, params)
    context = make_context(model.config, pack.positions[None], pack.owners[None])
    prompts = _Prompts(owners=pack.owners)
    embedded, prelude = apply(pack.tokens[None], context, prompts, True, method="embed")

    def loop(state: Float[Array, "1 S D"], done: Int[Array, ""]) -> tuple[Array, PyTree]:
        output, core, coda = apply(state, embedded, context, done, prompts, prompts, True, method="loop_step")
        last = LastToken(
            hidden=output.hidden[0, pack.ends],
            state=output.state[0, pack.ends],
            gate_logits=output.gate_logits[0, pack.ends],
        )
        return output.state, (last, core, coda)

    _, (last, *own) = jax.lax.scan(loop, apply(embedded, method="initial_state"), jnp.arange(loops))
    core, coda = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), own)
    return last, ModelCache(core=core, prelude=jax.tree.map(lambda x: x[:, None], prelude), coda=coda)


@flax.struct.dataclass
class _Prompts:
    """Attention within each prompt of a pack. Implements `Past`, although nothing comes before a pack.

    Queries attend in blocks, each to the keys up to its end: half of the scores are never computed, and no array has
    both S queries and S keys.
    """

    owners: Int[Array, "S"]

    def attend(
        self, layer: int | Int[Array, ""], queries: Float[Array, "1 S H Dh"], own: KeyValues, context: Context
    ) -> Float[Array, "1 S H Dh"]:
        """Returns attention of each token to its prompt up to itself."""
        del layer, context
        _, length, num_heads, head_width = queries.shape
        kv_heads = own.keys.shape[2]
        # With the heads first, each product is over contiguous matrices, which is faster on a CPU.
        keys, values = jnp.swapaxes(own.keys[0], 0, 1), jnp.swapaxes(own.values[0], 0, 1)
        scaled = (queries[0] * head_width**-0.5).reshape(length, kv_heads, num_heads // kv_heads, head_width)
        grouped = jnp.moveaxis(scaled, 0, 2)  # [K, G, S, Dh]

        size = max(_BLOCK, -(-length // _MOST_BLOCKS))
        blocks = []
        for start in range(0, length, size):
            end = min(start + size, length)
            mask = _visible(self.owners, start, end)
            blocks.append(_mixed(grouped[:, :, start:end], keys[:, :end], values[:, :end], mask))
        mixed = jnp.concatenate(blocks, axis=2).astype(queries.dtype)
        return jnp.moveaxis(mixed, 2, 0).reshape(queries.shape)


def _visible(owners: Int[Array, "S"], start: int, end: int) -> Bool[Array, "q e"]:
    """Returns which of the first `end` tokens of a pack each token from `start` to `end` attends to."""
    causal = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None]
    return causal & (owners[start:end, None] == owners[None, :end])


def _mixed(
    queries: Float[Array, "K G q Dh"],
    keys: Float[Array, "K e Dh"],
    values: Float[Array, "K e Dh"],
    mask: Bool[Array, "q e"],
) -> Float[Array, "K G q Dh"]:
    """Returns the values mixed by the softmax, in float32, of the scores that `mask` leaves: at least one a query."""
    scores = jnp.einsum("kgqd,ked->kgqe", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[None, None], scores, -jnp.inf)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("kgqe,ked->kgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return mixed / total


def _where(rows: Bool[Array, "N"], new: Array, old: Array) -> Array:
    return jnp.where(rows.reshape(-1, *[1] * (old.ndim - 1)), new, old)
