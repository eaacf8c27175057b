"""The slots of a decoder: each holds one request, at its own position and loop."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.halting import ExitPolicy
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.halting.signals import LoopMemory
from looplm_jax.inference._cache_layout import PoolSize
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._kv_cache import Cache, empty_pool
from looplm_jax.inference._sampling import SamplingTable
from looplm_jax.models._looplm import LoopLM, compute_dtype

# The table of stop ids has a fixed width; further stop conditions are checked on the host.
MOST_STOP_IDS = 8
NO_TOKEN = -1
# A bound for infinite budgets, which fit no integer.
_MOST_LOOPS = 2**20


@flax.struct.dataclass
class SlotSettings:
    """The settings of a request: of one slot or, with a leading axis N, of all. `stop_ids` is padded with -1."""

    policy: PolicyTable
    sampling: SamplingTable
    limit: Int[Array, "*N"]  # maximum number of new tokens
    budget: Float[Array, "*N"]  # mean loops per token, at least 1; infinity: no limit beyond the policy
    stop_ids: Int[Array, "*N W"]


@flax.struct.dataclass
class Slots:
    """N running requests. The token of a slot has completed `memory.loop` loops and is not yet in its cache."""

    cache: Cache
    tokens: Int[Array, "N"]
    state: Float[Array, "N 1 D"]  # after the last completed loop
    embedded: Float[Array, "N 1 D"] | None  # the prelude's output, if there is a prelude
    memory: LoopMemory  # of the token: completed loops, and what exit policies compare with the next one
    num_generated: Int[Array, "N"]  # number of new tokens, including the running one
    loops_used: Int[Array, "N"]  # loops used by the new tokens before it
    active: Bool[Array, "N"]
    settings: SlotSettings
    seen_tokens: Bool[Array, "N V"] | None  # tokens of prompt and text, if a request has a repetition penalty

    @property
    def max_loops(self) -> Int[Array, "N"]:
        """Returns the loops that the budget allows the running token, at least 1; the mean never exceeds the budget."""
        # The total budget up to this token, minus what earlier tokens used.
        total = jnp.floor(self.settings.budget * self.num_generated.astype(jnp.float32))
        return jnp.clip(total - self.loops_used.astype(jnp.float32), 1, _MOST_LOOPS).astype(jnp.int32)

    def replace(self, **changes: object) -> "Slots":
        """Returns a copy with fields replaced."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


# Creating slots


def empty_slots(
    model: LoopLM,
    strategy: CacheStrategy,
    size: PoolSize,
    *,
    rows: int,
    loops: int,
    cache_dtype: DTypeLike,
    policies: PolicyTable,
    remember_tokens: bool = False,
) -> Slots:
    """Returns `rows` slots without requests, which share the pages of a pool, for tokens of up to `loops` loops."""
    config, dtype = model.config, compute_dtype(model.compute)
    state = jnp.zeros((rows, 1, config.width), dtype)

    return Slots(
        cache=empty_pool(config, strategy, size, rows=rows, loops=loops, dtype=cache_dtype),
        tokens=jnp.zeros(rows, jnp.int32),
        state=state,
        embedded=jnp.zeros_like(state) if config.prelude_layers else None,
        memory=fresh_memory(model, policies, rows),
        num_generated=jnp.zeros(rows, jnp.int32),
        loops_used=jnp.zeros(rows, jnp.int32),
        active=jnp.zeros(rows, bool),
        settings=SlotSettings(
            policy=policies,
            sampling=SamplingTable.empty(rows),
            limit=jnp.zeros(rows, jnp.int32),
            budget=jnp.full(rows, jnp.inf, jnp.float32),
            stop_ids=jnp.full((rows, MOST_STOP_IDS), NO_TOKEN, jnp.int32),
        ),
        seen_tokens=jnp.zeros((rows, config.vocab_size), bool) if remember_tokens else None,
    )


def fresh_memory(model: LoopLM, policies: PolicyTable, rows: int) -> LoopMemory:
    """Returns the memory of tokens before their first loop."""
    config = model.config
    return LoopMemory.before_loops(
        policies.needs,
        jax.ShapeDtypeStruct((rows, config.width), compute_dtype(model.compute)),
        jax.ShapeDtypeStruct((rows, config.vocab_size), np.dtype(np.float32)),
    )


# Changing one slot


@functools.partial(jax.jit, donate_argnames=("slots",))
def release(slots: Slots, slot: Int[Array, ""]) -> Slots:
    """Returns the slots with one request ended before its last token. The slots are donated."""
    # Everything else may stay: inactive slots neither write to the cache nor choose tokens.
    return slots.replace(active=slots.active.at[slot].set(False))


@functools.partial(jax.jit, donate_argnames=("slots",))
def set_budget(slots: Slots, slot: Int[Array, ""], loops_per_token: Float[Array, ""]) -> Slots:
    """Sets a new budget for the following tokens; past savings and debts are dropped. The slots are donated."""
    settings = slots.settings
    # As if every token so far had used exactly the new budget.
    used = jnp.floor(loops_per_token * (slots.num_generated[slot] - 1).astype(jnp.float32))
    return slots.replace(
        settings=dataclasses.replace(settings, budget=settings.budget.at[slot].set(loops_per_token)),
        loops_used=slots.loops_used.at[slot].set(jnp.clip(used, 0, _MOST_LOOPS).astype(jnp.int32)),
    )


def grow_policies(model: LoopLM, slots: Slots, policy: ExitPolicy) -> Slots:
    """Returns slots with room for a policy of a new kind and its memory. Programs over the slots are recompiled.

    Raises any error that the policy raises when traced, before it can affect the programs of other requests.
    """
    table = slots.settings.policy.with_kind(policy)
    # One row is the shape of a prefill, all rows that of a tick.
    for rows in (1, slots.tokens.size):
        jax.eval_shape(lambda rows=rows: _ask(model, policy, table, rows))

    fresh = fresh_memory(model, table, slots.tokens.size)
    # What the running tokens remember stays; only the new kind's signals start empty.
    kept = {
        field.name: getattr(slots.memory, field.name)
        for field in dataclasses.fields(slots.memory)
        if getattr(slots.memory, field.name) is not None
    }

    settings = dataclasses.replace(slots.settings, policy=table)
    return slots.replace(settings=settings, memory=dataclasses.replace(fresh, **kept))


def _ask(model: LoopLM, policy: ExitPolicy, table: PolicyTable, rows: int) -> Bool[Array, "N"]:
    """Evaluates a policy on placeholder values."""
    config, dtype = model.config, compute_dtype(model.compute)
    hidden, logits = jnp.zeros((rows, config.width), dtype), jnp.zeros((rows, config.vocab_size))
    signals = fresh_memory(model, table, rows).observe(jnp.zeros(rows), hidden, logits, jnp.zeros(rows), hidden)
    return policy.exits(signals)
