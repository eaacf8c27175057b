"""Replay: recomputes the log-probabilities of generated tokens, given the tokens and their exit loops.

The keys and values that a token saw of an earlier one at loop t depend on the cache, and on the loop at which the
earlier token exited. With a full cache they are those of the earlier token's own loop t, or of its exit loop if it
exited before t, so all tokens can be computed in parallel, loop by loop. The other caches show later loops, such as the
last one, so tokens have to be computed one after another, as in generation.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from looplm_jax.config import Remat
from looplm_jax.errors import UserError
from looplm_jax.halting._distribution import log_exit_probability
from looplm_jax.inference._cache_attention import PastView
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._kv_cache import Cache, empty_cache, share
from looplm_jax.inference._requests import Result
from looplm_jax.inference._rollouts import Rollouts, Turns
from looplm_jax.inference._tick import bound
from looplm_jax.losses._cross_entropy import token_losses
from looplm_jax.models._blocks import Context, make_context
from looplm_jax.models._looplm import LoopLM, ModelCache, Params, check_loops, compute_dtype, for_calls, head_matrix


def replay(
    model: LoopLM,
    params: Params,
    result: Result,
    *,
    strategy: CacheStrategy = CacheStrategy.FULL,
    loops: int | None = None,
) -> Float[np.ndarray, "N"]:
    """Recomputes `result.log_probs`. Programs are compiled for buckets of lengths.

    Args:
      model: the network.
      params: its parameters.
      result: the result of any request; the turns that the request continued are replayed first.
      strategy: the cache strategy of the engine that produced it.
      loops: the number of loops of that engine; default: the trained depth.

    Raises:
      UserError: a token was chosen at a loop beyond `loops`.
    """
    loops = model.config.loops if loops is None else loops
    check_loops(model.config, loops)

    rollouts = Rollouts.of([result], loops=loops, longest=model.config.max_positions)
    log_probs = replay_log_probs(model, params, rollouts, strategy=strategy, loops=loops)
    return np.asarray(log_probs)[0, : len(result.tokens)]


@flax.struct.dataclass
class Scores:
    """The scores of new tokens in a replay, in float32 and nats; 0 for padding.

    Attributes:
      token: the log-probability of each token at its exit loop and temperature 1.
      exit: the log-probability of its exit loop, by the gates of the loops up to it.
      per_loop: the log-probability of each token at every loop, if asked for.
      gate_logits: the gates of every loop before each token. Those after its exit loop have no meaning.
    """

    token: Float[Array, "B N"]
    exit: Float[Array, "B N"]
    per_loop: Float[Array, "T B N"] | None
    gate_logits: Float[Array, "T B N"]


@functools.partial(jax.jit, static_argnames=("model", "strategy", "loops", "per_loop"))
def replay_scores(
    model: LoopLM,
    params: Params,
    rollouts: Rollouts,
    *,
    loops: int,
    strategy: CacheStrategy = CacheStrategy.FULL,
    per_loop: bool = False,
) -> Scores:
    """Returns the log-probability of every new token and of its exit.

    Pure, and differentiable with respect to `params`; exit loops are treated as constants.

    Args:
      model: the network.
      params: its parameters.
      rollouts: the generated tokens.
      loops: the maximum number of loops per token, T, which prompts ran.
      strategy: the cache strategy that they were generated with.
      per_loop: whether to score every token at all loops too. They mean something for tokens that ran all loops.

    Raises:
      UserError: all loops are asked for with a cache that shares a plane between loops.
    """
    # A shared plane is overwritten from loop to loop, so what a token saw depends on when the others exited.
    if strategy.shares:
        if per_loop:
            raise UserError(f"scores at every loop need the cache {CacheStrategy.FULL.value!r}, not {strategy.value!r}")
        hidden, gate_logits = states_in_turn(model, params, rollouts, strategy=strategy, loops=loops)
        states = hidden[None]
    else:
        states, gate_logits = states_at_once(model, params, rollouts, loops=loops, per_loop=per_loop)

    losses = token_losses(states, head_matrix(params, model.config), rollouts.tokens)
    scores = jnp.where(rollouts.mask, -losses, 0.0)
    gate_logits = jnp.where(rollouts.mask, gate_logits.astype(jnp.float32), 0.0)
    exits = rollouts.exit_loops

    return Scores(
        token=jnp.take_along_axis(scores, exits[None] - 1, axis=0)[0] if per_loop else scores[0],
        exit=jnp.where(rollouts.mask, log_exit_probability(gate_logits, exits), 0.0),
        per_loop=scores if per_loop else None,
        gate_logits=gate_logits,
    )


@functools.partial(jax.jit, static_argnames=("model", "strategy", "loops"))
def replay_log_probs(
    model: LoopLM, params: Params, rollouts: Rollouts, *, strategy: CacheStrategy, loops: int
) -> Float[Array, "B N"]:
    """Returns the log-probability of every new token at its exit loop and temperature 1, in nats; 0 for padding.

    Pure, and differentiable with respect to `params`; exit loops are treated as constants.

    Args:
      model: the network.
      params: its parameters.
      rollouts: the generated tokens.
      strategy: the cache strategy that they were generated with.
      loops: the maximum number of loops per token, T, which prompts ran.
    """
    return replay_scores(model, params, rollouts, strategy=strategy, loops=loops).token


def rollout_gap(results: Sequence[Result], scores: Scores) -> float:
    """Returns the largest difference between a log-probability of the engine and that of a replay, in nats.

    Both those of tokens and of exits count. It is a rounding error if the replay has the parameters, the loops and
    the cache of the engine. A larger one means that the policy which is updated did not generate the tokens.

    Args:
      results: the results in the order of the rows of `scores`.
      scores: their replay.
    """
    replayed = np.stack([scores.token, scores.exit])
    differences = [
        replayed[:, row, : len(own.tokens)] - np.array([own.log_probs, own.exit_log_probs])
        for row, own in enumerate(results)
    ]
    # NaN, of parameters that are not finite, is the largest difference.
    return float(np.max(np.abs(np.concatenate(differences, axis=1)), initial=0.0))


# All tokens in parallel


def states_at_once(
    model: LoopLM, params: Params, rollouts: Rollouts, *, loops: int, per_loop: bool = False
) -> tuple[Float[Array, "A B N D"], Float[Array, "T B N"]]:
    """Returns the states before each new token with a full cache, and the gates: all tokens in parallel.

    The states are those that the tokens were chosen from, with A = 1, or with `per_loop` those of all loops, A = T.

    A token that has exited is still computed, but its result is unused: the others see the keys and values of its exit.
    """
    apply = bound(for_calls(model, loops), params)
    # [B, S] each
    tokens, depths = rollouts.joined(), rollouts.depths(loops)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    context = make_context(model.config, positions, jnp.ones_like(positions))
    embedded, _ = apply(tokens, context, method="embed")

    def loop(carry: PyTree, number: Int[Array, ""]) -> tuple[PyTree, PyTree]:
        state, kept, hidden = carry
        left = depths < number
        # Of `kept`, only the entries of tokens that have exited are visible.
        output, *own = apply(state, embedded, _of_two_ages(context, left), number - 1, *kept, True, method="loop_step")
        # Tokens that have exited keep the keys and values of their exit loop, [..., K, Dh].
        kept = jax.tree.map(lambda old, new: jnp.where(left[None, :, :, None, None], old, new), kept, own)
        # [B, N, D]: the states that would choose each new token at this loop.
        read = jnp.take_along_axis(output.hidden, rollouts.read_positions[..., None], axis=1)
        gate_logits = jnp.take_along_axis(output.gate_logits, rollouts.read_positions, axis=1)
        if not per_loop:
            hidden = jnp.where((rollouts.exit_loops == number)[..., None], read, hidden)
        return (output.state, kept, hidden), (gate_logits, read if per_loop else None)

    state = apply(embedded, method="initial_state")
    shapes = jax.eval_shape(lambda: apply(state, embedded, context, 0, None, None, True, method="loop_step"))

    # Never read: no token has exited before loop 1.
    kept = jax.tree.map(jnp.zeros_like, list(shapes[1:]))
    hidden = None if per_loop else jnp.zeros((*rollouts.tokens.shape, model.config.width), state.dtype)

    if model.compute.remat is Remat.LOOP:
        loop = jax.checkpoint(loop, prevent_cse=False)
    carry: PyTree = (state, kept, hidden)
    (_, _, at_exit), (gate_logits, at_every_loop) = jax.lax.scan(loop, carry, jnp.arange(1, loops + 1))
    return (at_every_loop if per_loop else at_exit[None]), gate_logits


def _of_two_ages(context: Context, left: Bool[Array, "B S"]) -> Context:
    """Masks keys: tokens that have exited are seen through the kept past, the others through this loop's keys."""
    # [B, 1, S]: by key, for all queries.
    old = left[:, None]
    assert context.mask is not None  # `make_context` was given no kernel
    return dataclasses.replace(context, mask=context.mask & ~old, past_mask=context.mask & old)


# One token after another


def states_in_turn(
    model: LoopLM, params: Params, rollouts: Rollouts, *, strategy: CacheStrategy, loops: int
) -> tuple[Float[Array, "B N D"], Float[Array, "T B N"]]:
    """Returns the state from which each new token was chosen, and the gates of all loops before it, with any cache.

    Prompts are computed in parallel, new tokens one after another.
    """
    model = for_calls(model, loops)
    new, exits, rows = rollouts.tokens.shape[1], rollouts.exit_loops, jnp.arange(rollouts.lengths.size)
    cache = empty_cache(
        model.config,
        strategy,
        rows=rows.size,
        # Padding is written too, so the cache has room for a padded turn after the longest row.
        capacity=rollouts.size + max(new, 0 if rollouts.history is None else rollouts.history.tokens.shape[2]),
        loops=loops,
        dtype=compute_dtype(model.compute),
        in_lanes=False,
    )

    def turn(cache: Cache, turn: Turns) -> tuple[Cache, None]:
        cache, *_ = _read_prompts(model, loops, params, cache, turn.prompts, turn.prompt_lengths)
        planes, *_ = _decode(model, loops, params, cache, turn.tokens.T, turn.depths.T)
        return dataclasses.replace(cache, planes=planes, lengths=cache.lengths + turn.lengths), None

    if rollouts.history is not None:
        cache, _ = jax.lax.scan(turn, cache, rollouts.history)

    cache, hidden, gates = _read_prompts(model, loops, params, cache, rollouts.prompts, rollouts.prompt_lengths)
    # The prompt's last token predicts the first new token, at that token's exit loop.
    first = hidden[exits[:, 0] - 1, rows]
    _, rest, gates_of_rest = _decode(model, loops, params, cache, rollouts.tokens[:, :-1].T, exits[:, 1:].T)
    return (
        jnp.concatenate([first[:, None], jnp.swapaxes(rest, 0, 1)], axis=1),
        # [N - 1, T, B] -> [T, B, N - 1]
        jnp.concatenate([gates[..., None], jnp.moveaxis(gates_of_rest, 0, 2)], axis=2),
    )


def _read_prompts(
    model: LoopLM, loops: int, params: Params, cache: Cache, prompts: Int[Array, "B P"], lengths: Int[Array, "B"]
) -> tuple[Cache, Float[Array, "T B D"], Float[Array, "T B"]]:
    """Appends a prompt to each row. Returns the cache, and states and gates of every loop at the last prompt tokens.

    The tokens of a prompt see all loops of one another; of earlier tokens, they see what the cache keeps.
    """
    apply, dtype, rows = bound(model, params), compute_dtype(model.compute), jnp.arange(cache.rows)
    context = cache.context(model.config, prompts.shape[1])
    past = cache.past_prelude(dtype, differentiable=True)
    embedded, prelude = apply(prompts, context, past, True, method="embed")

    def loop(state: Float[Array, "B P D"], done: Int[Array, ""]) -> tuple[Array, PyTree]:
        planes = jnp.broadcast_to(done, rows.shape)
        past = _read_at(cache, planes, dtype)
        output, core, coda = apply(state, embedded, context, done, *past, True, method="loop_step")
        # The last token of a prompt, whose position differs between rows.
        last = output.hidden[rows, lengths - 1], output.gate_logits[rows, lengths - 1]
        return output.state, (*last, core, coda)

    if model.compute.remat is Remat.LOOP:
        loop = jax.checkpoint(loop, prevent_cse=False)
    start = apply(embedded, method="initial_state")
    _, (hidden, gates, *own) = jax.lax.scan(loop, start, jnp.arange(loops))
    # [T, L, ...] -> [L, T, ...]: layers are the first axis of a cache.
    core, coda = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), own)
    planes = ModelCache(core=core, prelude=jax.tree.map(lambda x: x[:, None], prelude), coda=coda)
    # A prompt is read with all planes, and only then reduced to what the strategy keeps.
    kept = share(Cache(planes=planes, lengths=lengths, strategy=CacheStrategy.FULL), cache.strategy)
    return _append(cache, kept), hidden, gates


def _read_at(cache: Cache, loops_done: Int[Array, "B"], dtype: DTypeLike) -> list[PastView | None]:
    """Returns the views of core and coda that each row reads in its next loop, in differentiable form."""
    stacks = cache.planes.core, cache.planes.coda
    return [cache.past(stacked, loops_done, dtype, differentiable=True) for stacked in stacks]


def _append(cache: Cache, new: Cache) -> Cache:
    """Returns the cache with the rows of `new` appended to its own."""
    rows, places = jnp.arange(cache.rows)[:, None], cache.lengths[:, None] + jnp.arange(new.capacity)[None]
    planes = jax.tree.map(
        lambda whole, own: whole.at[:, :, rows, places].set(own, mode="drop"), cache.planes, new.planes
    )
    return dataclasses.replace(cache, planes=planes, lengths=cache.lengths + new.lengths)


# The plain derivative of a scan would save the cache of every step. One is enough: a position never changes after it is
# written, so the last cache, truncated to an earlier length, is the cache of that step.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(
    model: LoopLM, loops: int, params: Params, cache: Cache, tokens: Int[Array, "N B"], exits: Int[Array, "N B"]
) -> tuple[ModelCache, Float[Array, "N B D"], Float[Array, "N T B"]]:
    """Returns the planes of the cache with N more tokens, and exit states and gates of these, one after another."""
    result, _ = _decode_forward(model, loops, params, cache, tokens, exits)
    return result


def _decode_forward(
    model: LoopLM, loops: int, params: Params, cache: Cache, tokens: Int[Array, "N B"], exits: Int[Array, "N B"]
) -> tuple[tuple[ModelCache, Float[Array, "N B D"], Float[Array, "N T B"]], PyTree]:
    """Returns the result of `_decode`, and the residuals of its backward pass."""

    def one(cache: Cache, token: tuple[Array, Array]) -> tuple[Cache, tuple[Array, Array]]:
        own, hidden, gates = _run_token(model, loops, params, cache, *token)
        rows = jnp.arange(cache.rows)
        planes = jax.tree.map(
            lambda whole, new: whole.at[:, :, rows, cache.lengths].set(new[:, :, :, 0]), cache.planes, own
        )
        return dataclasses.replace(cache, planes=planes, lengths=cache.lengths + 1), (hidden, gates)

    cache, (hidden, gates) = jax.lax.scan(one, cache, (tokens, exits))
    return (cache.planes, hidden, gates), (params, cache, tokens, exits)


def _decode_backward(
    model: LoopLM,
    loops: int,
    residuals: PyTree,
    cotangents: tuple[ModelCache, Float[Array, "N B D"], Float[Array, "N T B"]],
) -> tuple[Any, ...]:
    """Processes tokens in reverse, so that a token's cotangents are complete: only later tokens read its entry."""
    params, last, tokens, exits = residuals
    d_planes, *d_outputs = cotangents
    rows = jnp.arange(last.rows)

    def one(carry: PyTree, token: PyTree) -> tuple[PyTree, None]:
        d_params, d_planes, lengths = carry
        *token_and_exit, d_outputs = token
        lengths = lengths - 1

        def again(params: Params, planes: ModelCache) -> tuple[ModelCache, Array, Array]:
            cache = dataclasses.replace(last, planes=planes, lengths=lengths)
            return _run_token(model, loops, params, cache, *token_and_exit)

        # The token's own entry: its cotangent is consumed here, and set to zero in the cache.
        d_own = jax.tree.map(lambda whole: whole[:, :, rows, lengths][:, :, :, None], d_planes)
        d_planes = jax.tree.map(lambda whole: whole.at[:, :, rows, lengths].set(0), d_planes)
        # Recomputes the forward pass of this token.
        _, pull = jax.vjp(again, params, last.planes)
        sums = jax.tree.map(jnp.add, (d_params, d_planes), pull((d_own, *d_outputs)))
        return (*sums, lengths), None

    carry = (jax.tree.map(jnp.zeros_like, params), d_planes, last.lengths)
    (d_params, d_planes, _), _ = jax.lax.scan(one, carry, (tokens, exits, d_outputs), reverse=True)
    return d_params, dataclasses.replace(last, planes=d_planes, lengths=None), None, None


_decode.defvjp(_decode_forward, _decode_backward)


def _run_token(
    model: LoopLM, loops: int, params: Params, cache: Cache, tokens: Int[Array, "B"], exits: Int[Array, "B"]
) -> tuple[ModelCache, Float[Array, "B D"], Float[Array, "T B"]]:
    """Runs the next token of each row. Returns what a cache keeps of it, its exit state, and the gates of all loops."""
    apply, dtype, rows = bound(model, params), compute_dtype(model.compute), cache.rows
    context = cache.context(model.config)
    past = cache.past_prelude(dtype, differentiable=True)
    embedded, prelude = apply(tokens[:, None], context, past, True, method="embed")

    def loop(carry: PyTree, number: Int[Array, ""]) -> tuple[PyTree, Array]:
        state, hidden, own = carry
        done = jnp.full(rows, number)
        past = _read_at(cache, done, dtype)
        output, core, coda = apply(state, embedded, context, done, *past, True, method="loop_step")
        # Loops after the exit are computed, because all rows share a program, but not written.
        own = own.write(ModelCache(core=core, prelude=prelude, coda=coda), done, done < exits)
        hidden = jnp.where((done + 1 == exits)[:, None], output.hidden[:, 0], hidden)
        return (output.state, hidden, own), output.gate_logits[:, 0]

    # A cache of one position collects what the strategy keeps of the token.
    own = empty_cache(model.config, cache.strategy, rows=rows, capacity=1, loops=loops, dtype=dtype, in_lanes=False)
    state = apply(embedded, method="initial_state")
    carry = (state, jnp.zeros_like(state[:, 0]), own)
    (_, hidden, own), gates = jax.lax.scan(loop, carry, jnp.arange(loops))
    return own.planes, hidden, gates
