"""One round of self-speculation: draft with loop s, verify with loop T (LoopSpec, arXiv 2609.17184).

The last token of a row, x_0, is not yet in its cache. A round with k drafts is

    draft    k sequential passes: x_j goes through loops 1..s, whose logits give the draft x_(j+1), j = 0..k-1
    verify   x_0 .. x_(k-1) in parallel through loops s+1..T, from their states after loop s: loop T's x_1 .. x_k

The first s loops of a draft are also the first s loops of the verifier, so nothing is computed twice. The drafts that
`accept` keeps are appended to the row, followed by a corrected token; the cache then holds all tokens except the last,
as before. Positions that rejected drafts wrote after these are never read, and are overwritten later.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from looplm_jax.inference._cache_layout import at_positions, constrain, store_heads
from looplm_jax.inference._kv_cache import Cache
from looplm_jax.inference._sampling import SamplingTable, probabilities, sample_rows, token_key
from looplm_jax.inference._tick import bound, logits_of
from looplm_jax.models._blocks import KeyValues
from looplm_jax.models._looplm import LoopLM, ModelCache, Params, compute_dtype

# The acceptance test


@flax.struct.dataclass
class Acceptance:
    """The result of verification: the first `counts[n]` of `tokens[n]` are kept.

    These are `accepted[n]` drafts, and a corrected token after a rejected one. If all k drafts pass, they are the k
    tokens, and nothing is corrected.
    """

    tokens: Int[Array, "N k"]
    counts: Int[Array, "N"]
    accepted: Int[Array, "N"]


def accept(
    drafts: Int[Array, "N k"],
    target: Float[Array, "N k V"],
    proposal: Float[Array, "N k V"],
    keys: Key[Array, "N k"],
) -> Acceptance:
    """Keeps draft x with probability `min(1, p(x) / q(x))`, and draws a correction from `max(p - q, 0)`, normalized.

    The correction follows the last draft that is kept. This is speculative sampling (Leviathan et al., arXiv
    2211.17192, section 2.3). If p and q each have all their weight on one token, it is greedy verification: drafts are
    kept as long as they equal the verifier's choice.

    Args:
      drafts: k tokens per sequence.
      target: p, the distribution that the tokens should follow, given the drafts before them.
      proposal: q, the distribution from which the drafts were drawn.
      keys: random keys, independent of those that drew the drafts.
    """
    size = drafts.shape[1]
    # [N, k, 2] -> 2 x [N, k]
    test_keys, correction_keys = jnp.moveaxis(jax.vmap(jax.vmap(jax.random.split))(keys), -1, 0)

    chance = jax.vmap(jax.vmap(jax.random.uniform))(test_keys)
    # Without a division: q may be tiny, and a draft that p excludes must fail even for chance 0.
    passed = chance * _of(proposal, drafts) < _of(target, drafts)
    # The cumulative product is 0 after the first rejected draft.
    accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=1), axis=1)

    rows, rejected = jnp.arange(drafts.shape[0]), jnp.minimum(accepted, size - 1)
    # [N, V]; unused for rows without a rejected draft.
    wanted = target[rows, rejected]
    residual = jnp.maximum(wanted - proposal[rows, rejected], 0)
    # Rounding may leave no weight if p and q are almost equal.
    weights = jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), residual, wanted)
    corrected = jax.vmap(jax.random.categorical)(correction_keys[rows, rejected], jnp.log(weights))

    # The correction replaces the first rejected draft.
    tokens = jnp.where(jnp.arange(size)[None] == accepted[:, None], corrected[:, None].astype(jnp.int32), drafts)
    return Acceptance(tokens=tokens, counts=jnp.minimum(accepted + 1, size), accepted=accepted)


def _of(probabilities: Float[Array, "N k V"], tokens: Int[Array, "N k"]) -> Float[Array, "N k"]:
    """Returns the probability of each token."""
    return jnp.take_along_axis(probabilities, tokens[..., None], axis=-1)[..., 0]


# The rows on the device


@flax.struct.dataclass
class SpeculativeRows:
    """N running sequences in a full cache. The last token of each is not yet in the cache."""

    cache: Cache
    tokens: Int[Array, "N"]
    num_generated: Int[Array, "N"]  # number of new tokens
    sampling: SamplingTable
    seen_tokens: Bool[Array, "N V"] | None  # tokens of prompt and text, if a row has a repetition penalty

    def extend(self, cache: Cache, tokens: Int[Array, "N S"], counts: Int[Array, "N"]) -> "SpeculativeRows":
        """Returns the rows with `counts[n]` of `tokens[n]` appended. `cache` has read all of them except the last."""
        rows = jnp.arange(counts.size)
        new = jnp.arange(tokens.shape[1])[None] < counts[:, None]
        seen = self.seen_tokens
        if seen is not None:
            # Padding is written to the index V, which is out of bounds, and dropped.
            seen = seen.at[rows[:, None], jnp.where(new, tokens, seen.shape[1])].set(True, mode="drop")

        extended = SpeculativeRows(
            cache=cache.advance(counts),
            tokens=jnp.where(counts > 0, tokens[rows, jnp.maximum(counts - 1, 0)], self.tokens),
            num_generated=self.num_generated + counts,
            sampling=self.sampling,
            seen_tokens=seen,
        )
        return constrain(extended)


@flax.struct.dataclass
class Draft:
    """k drafts of each row, and the inputs of their verification. `states` are of the tokens before the drafts."""

    tokens: Int[Array, "N k"]
    logits: Float[Array, "N k V"]  # of loop s
    states: Float[Array, "N k D"]  # after loop s
    embedded: Float[Array, "N k D"]
    seen_tokens: Bool[Array, "N k V"] | None  # tokens before each draft


@flax.struct.dataclass
class Verified:
    """The outcome of verification, as in `Acceptance`, with log-probabilities under loop T (raw logits)."""

    tokens: Int[Array, "N k"]
    log_probs: Float[Array, "N k"]
    counts: Int[Array, "N"]
    accepted: Int[Array, "N"]
    failed: Bool[Array, "N"]  # logits were not finite after the kept tokens


# Programs


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("rows",))
def read(
    model: LoopLM, params: Params, rows: SpeculativeRows, tokens: Int[Array, "N S"], counts: Int[Array, "N"]
) -> SpeculativeRows:
    """Reads the first `counts[n]` of `tokens[n]`, a part of the prompt, through all T loops. The rows are donated."""
    done = _read(model, params, rows.cache, tokens, rows.cache.depth)
    return constrain(dataclasses.replace(rows, cache=done.cache.advance(counts)))


@functools.partial(jax.jit, static_argnames=("model", "loops", "drafts"), donate_argnames=("rows",))
def draft(
    model: LoopLM, params: Params, rows: SpeculativeRows, *, loops: int, drafts: int
) -> tuple[SpeculativeRows, Draft]:
    """Returns `drafts` drafts per row, by loop `loops`. The first `loops` planes of the cache then hold them.

    The rows are donated, and keep their lengths.
    """

    def one(rows: SpeculativeRows, _: None) -> tuple[SpeculativeRows, Draft]:
        # One token at a time, through the first loops only.
        done = _read(model, params, rows.cache, rows.tokens[:, None], loops)
        logits = logits_of(model, params, done.hidden[:, 0])
        tokens = sample_rows(logits, rows.sampling, rows.num_generated, rows.seen_tokens).tokens
        drafted = Draft(
            tokens=tokens,
            logits=logits,
            states=done.state[:, 0],
            embedded=done.embedded[:, 0],
            seen_tokens=rows.seen_tokens,
        )
        return rows.extend(done.cache, tokens[:, None], jnp.ones_like(tokens)), drafted

    # Drafts are tentative: afterwards, only the planes of the cache are kept from the rows that the scan extended.
    after, drafted = jax.lax.scan(one, rows, length=drafts)
    cache = dataclasses.replace(after.cache, lengths=rows.cache.lengths)
    return constrain((dataclasses.replace(rows, cache=cache), jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), drafted)))


@functools.partial(jax.jit, static_argnames=("model", "draft_loops"), donate_argnames=("rows",))
def verify_drafts(
    model: LoopLM, params: Params, rows: SpeculativeRows, drafted: Draft, active: Bool[Array, "N"], *, draft_loops: int
) -> tuple[SpeculativeRows, Verified]:
    """Keeps the drafts that loop T accepts. The rows are donated; rows that are not `active` stay unchanged."""
    loops = range(draft_loops, rows.cache.depth)
    done = _run_loops(model, params, rows.cache, drafted.states, drafted.embedded, loops)
    # The states after loop T at the k inputs predict the k tokens that the drafts proposed.
    logits = logits_of(model, params, done.hidden)
    acceptance = _accept(rows, drafted, logits)
    counts, failed = _before_failure(logits, acceptance.counts)

    counts = jnp.where(active, counts, 0)

    verified = Verified(
        tokens=acceptance.tokens,
        log_probs=_log_probs(logits, acceptance.tokens),
        counts=counts,
        accepted=jnp.minimum(acceptance.accepted, counts),
        failed=failed & active,
    )
    return rows.extend(done.cache, acceptance.tokens, counts), verified


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("rows",))
def force(
    model: LoopLM, params: Params, rows: SpeculativeRows, tokens: Int[Array, "N S"], counts: Int[Array, "N"]
) -> tuple[SpeculativeRows, Verified]:
    """Appends the first `counts[n]` of `tokens[n]` unchanged, through all T loops. The rows are donated."""
    # Each token is predicted from the one before it, so the inputs are shifted by one.
    before = jnp.concatenate([rows.tokens[:, None], tokens[:, :-1]], axis=1)
    done = _read(model, params, rows.cache, before, rows.cache.depth)

    logits = logits_of(model, params, done.hidden)
    counts, failed = _before_failure(logits, counts)

    forced = Verified(
        tokens=tokens,
        log_probs=_log_probs(logits, tokens),
        counts=counts,
        accepted=jnp.zeros_like(counts),
        failed=failed,
    )
    return rows.extend(done.cache, tokens, counts), forced


# Passes of the stack


@flax.struct.dataclass
class _Pass:
    """The result of loops on S tokens per row. Their keys and values are in the cache, after its `lengths`."""

    cache: Cache
    embedded: Float[Array, "N S D"]
    state: Float[Array, "N S D"]
    hidden: Float[Array, "N S D"]


def _read(model: LoopLM, params: Params, cache: Cache, tokens: Int[Array, "N S"], loops: int) -> _Pass:
    """Runs tokens after those of the cache through loops 1 .. `loops`."""
    apply = bound(model, params)
    context = cache.context(model.config, tokens.shape[1])
    past = cache.past_prelude(compute_dtype(model.compute))

    embedded, prelude = apply(tokens, context, past, True, method="embed")
    if prelude is not None:
        # The prelude has a single plane.
        own = jax.tree.map(lambda new: new[None], prelude)
        planes = dataclasses.replace(cache.planes, prelude=_write(cache, cache.planes.prelude, own, range(1)))
        cache = dataclasses.replace(cache, planes=planes)

    return _run_loops(model, params, cache, apply(embedded, method="initial_state"), embedded, range(loops))


def _run_loops(
    model: LoopLM,
    params: Params,
    cache: Cache,
    state: Float[Array, "N S D"],
    embedded: Float[Array, "N S D"],
    loops: range,
) -> _Pass:
    """Runs tokens after those of the cache, which have completed `loops.start` loops, up to loop `loops.stop`."""
    apply, dtype = bound(model, params), compute_dtype(model.compute)
    context = cache.context(model.config, state.shape[1])

    def loop(carry: tuple[Array, Array], done: Int[Array, ""]) -> tuple[tuple[Array, Array], ModelCache]:
        planes = jnp.broadcast_to(done, cache.rows)
        past = cache.past(cache.planes.core, planes, dtype), cache.past(cache.planes.coda, planes, dtype)
        output, core, coda = apply(carry[0], embedded, context, done, *past, True, method="loop_step")
        return (output.state, output.hidden), ModelCache(core=core, coda=coda)

    # `hidden` starts with any array of its shape; the first loop replaces it.
    (state, hidden), own = jax.lax.scan(loop, (state, state), jnp.arange(loops.start, loops.stop))

    core = _write(cache, cache.planes.core, own.core, loops)
    assert core is not None
    coda = _write(cache, cache.planes.coda, own.coda, loops)
    planes = dataclasses.replace(cache.planes, core=core, coda=coda)
    return _Pass(cache=dataclasses.replace(cache, planes=planes), embedded=embedded, state=state, hidden=hidden)


def _write(cache: Cache, stacked: KeyValues | None, own: KeyValues | None, planes: range) -> KeyValues | None:
    """Writes keys and values of S tokens to some planes, after each row. Drops positions beyond the capacity."""

    def put(whole: Float[Array, "L P N C R W"], new: Float[Array, "p L N S K Dh"]) -> Float[Array, "L P N C R W"]:
        plane = jnp.arange(planes.start, planes.stop)[:, None, None]
        row = jnp.arange(cache.rows)[:, None]
        # [N, S]: after the tokens of each row.
        position = cache.lengths[:, None] + jnp.arange(new.shape[3])[None]
        stored = store_heads(jnp.swapaxes(new, 0, 1), whole.shape).astype(whole.dtype)
        return at_positions(whole, slice(None), plane, row, position).set(stored, mode="drop")

    return jax.tree.map(put, stacked, own)


# Acceptance


def _accept(rows: SpeculativeRows, drafted: Draft, logits: Float[Array, "N k V"]) -> Acceptance:
    """Applies the acceptance test to the drafts of all rows."""
    # Both distributions are filtered alike (temperature, top-k and so on): the test compares what would be sampled.
    sampling = jax.tree.map(lambda number: number[:, None], rows.sampling)
    # [N, k]: the number of each new token, as in ordinary sampling.
    numbers = rows.num_generated[:, None] + jnp.arange(logits.shape[1])[None]

    def key(table: SamplingTable, number: Int[Array, ""]) -> Array:
        return jax.random.fold_in(token_key(table, number), 1)  # the token's own key drew the draft

    return accept(
        drafted.tokens,
        probabilities(logits, sampling, drafted.seen_tokens),
        probabilities(drafted.logits, sampling, drafted.seen_tokens),
        jax.vmap(jax.vmap(key, in_axes=(None, 0)))(rows.sampling, numbers),
    )


def _before_failure(logits: Float[Array, "N S V"], counts: Int[Array, "N"]) -> tuple[Int[Array, "N"], Bool[Array, "N"]]:
    """Returns how many of `counts` precede the first logits that are not finite, and whether that is fewer."""
    finite = jnp.isfinite(logits).all(axis=-1).astype(jnp.int32)
    before = jnp.sum(jnp.cumprod(finite, axis=1), axis=1)
    return jnp.minimum(counts, before), before < counts


def _log_probs(logits: Float[Array, "N S V"], tokens: Int[Array, "N S"]) -> Float[Array, "N S"]:
    """Returns the log-probability of each token from raw logits."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
