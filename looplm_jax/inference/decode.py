"""Prefill and decode: pure, compiled programs over a cache (paper v4, sections 3.2 and 5.4.2).

A prompt runs through all T loops at once. A new token runs loop after loop, each reading the plane of its own depth,
until the exit policy lets it go; the planes below its last loop take that loop's keys and values ("last exited").
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.halting import ExitPolicy
from looplm_jax.inference.cache import Cache, from_prefill, plane
from looplm_jax.inference.traced import Traced
from looplm_jax.models.looplm import LoopLM, LoopOutput, ModelCache, Params, head_matrix


@flax.struct.dataclass
class Decoded:
    """The cache with the tokens in it, what each row says of its next token, and at what cost."""

    cache: Cache
    logits: Float[Array, "B V"]  # float32, of the loop that the row left at
    exit_loops: Int[Array, "B"]  # loop that the last token left at, 1..T
    loops_run: Int[Array, ""]  # passes of the shared stack


@functools.partial(jax.jit, static_argnames=("model", "loops", "capacity"))
def prefill(
    model: LoopLM,
    params: Params,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, "B"],
    policy: Traced[ExitPolicy],
    *,
    loops: int,
    capacity: int,
) -> Decoded:
    """Run prompts through all `loops` loops; the policy chooses the loop that each one's last token is read at.

    Args:
      model: the network.
      params: its parameters.
      tokens: prompts, padded on the right to one length; what stands in the padding has no influence.
      lengths: tokens of each prompt, at least 1.
      policy: as `Traced.of` makes it.
      loops: planes of the cache, T: the most loops that any token will take.
      capacity: positions of the cache, C.
    """
    segment_ids = (jnp.arange(tokens.shape[1]) < lengths[:, None]).astype(jnp.int32)
    output, planes = _bound(model, params)(tokens, loops=loops, segment_ids=segment_ids, method="prefill")
    rows, last = jnp.arange(tokens.shape[0]), lengths - 1
    exit_loops = _exit_loops(policy.settings(), output.gate_logits[:, rows, last])
    hidden = output.hidden[exit_loops - 1, rows, last]
    return Decoded(
        cache=from_prefill(planes, lengths, capacity),
        logits=_logits(model, params, hidden),
        exit_loops=exit_loops,
        loops_run=jnp.int32(loops),
    )


def _exit_loops(policy: ExitPolicy, gate_logits: Float[Array, "T B"]) -> Int[Array, "B"]:
    loops = jnp.arange(1, gate_logits.shape[0] + 1)
    log_survival = jnp.cumsum(jax.nn.log_sigmoid(-gate_logits), axis=0)
    exits = jax.vmap(policy.exits)(log_survival, loops).at[-1].set(True)
    return jnp.argmax(exits, axis=0).astype(jnp.int32) + 1


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def decode_step(
    model: LoopLM, params: Params, cache: Cache, tokens: Int[Array, "B"], policy: Traced[ExitPolicy]
) -> Decoded:
    """Append one token to each row. The loops run until every row has left. The cache is donated: updated in place."""
    context = cache.context(model.config)
    apply = _bound(model, params)
    embedded, prelude = apply(tokens[:, None], context, cache.planes.prelude, True, method="embed")

    def body(carry: _Loops) -> _Loops:
        past = plane(cache.planes.core, carry.loop), plane(cache.planes.coda, carry.loop)
        output, core, coda = apply(carry.state, embedded, context, *past, True, method="loop_step")
        return _advance(carry, output, ModelCache(core=core, coda=coda), policy.settings())

    def running(carry: _Loops) -> Bool[Array, ""]:
        return jnp.any(~carry.exited)

    carry = jax.lax.while_loop(running, body, _first_loop(apply(embedded, method="initial_state"), cache))
    own = dataclasses.replace(carry.planes, prelude=prelude)
    return Decoded(
        cache=cache.append(own),
        logits=_logits(model, params, carry.hidden[:, 0]),
        exit_loops=carry.exit_loops,
        loops_run=carry.loop,
    )


@flax.struct.dataclass
class _Loops:
    """Between two loops of one token: where the rows are, and what those that left have left behind."""

    loop: Int[Array, ""]  # loops done
    state: Float[Array, "B 1 D"]
    hidden: Float[Array, "B 1 D"]
    planes: ModelCache  # of the token alone: core and coda, [T, L, B, 1, K, Dh]
    log_survival: Float[Array, "B"]
    exited: Bool[Array, "B"]
    exit_loops: Int[Array, "B"]


def _first_loop(state: Float[Array, "B 1 D"], cache: Cache) -> _Loops:
    def of_one_token(x: Float[Array, "T L B C K Dh"]) -> Float[Array, "T L B 1 K Dh"]:
        return jnp.zeros_like(x, shape=(*x.shape[:3], 1, *x.shape[4:]))

    rows = state.shape[0]
    return _Loops(
        loop=jnp.int32(0),
        state=state,
        hidden=jnp.zeros_like(state),
        planes=jax.tree.map(of_one_token, dataclasses.replace(cache.planes, prelude=None)),
        log_survival=jnp.zeros(rows, jnp.float32),
        exited=jnp.zeros(rows, bool),
        exit_loops=jnp.zeros(rows, jnp.int32),
    )


def _advance(carry: _Loops, output: LoopOutput, own: ModelCache, policy: ExitPolicy) -> _Loops:
    """One loop on. Rows that had left before keep what they left with."""
    loop, active = carry.loop + 1, ~carry.exited
    log_survival = carry.log_survival + jax.nn.log_sigmoid(-output.gate_logits[:, 0])
    deepest = carry.planes.core.keys.shape[0]

    def fill(planes: Float[Array, "T L B 1 K Dh"], own: Float[Array, "L B 1 K Dh"]) -> Float[Array, "T L B 1 K Dh"]:
        here_and_deeper = jnp.arange(deepest) >= carry.loop
        written = here_and_deeper[:, None, None, None, None, None] & active[:, None, None, None]
        return jnp.where(written, own[None], planes)

    return _Loops(
        loop=loop,
        state=output.state,
        hidden=jnp.where(active[:, None, None], output.hidden, carry.hidden),
        planes=jax.tree.map(fill, carry.planes, own),
        log_survival=log_survival,
        exited=carry.exited | policy.exits(log_survival, loop) | (loop >= deepest),
        exit_loops=jnp.where(active, loop, carry.exit_loops),
    )


def _bound(model: LoopLM, params: Params) -> Callable[..., Any]:
    return functools.partial(model.apply, {"params": params})


def _logits(model: LoopLM, params: Params, hidden: Float[Array, "B D"]) -> Float[Array, "B V"]:
    head = head_matrix(params, model.config).astype(hidden.dtype)
    return jnp.einsum("bd,dv->bv", hidden, head, preferred_element_type=jnp.float32)
