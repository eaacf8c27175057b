"""Long prompts into a cache whose loops share planes: loop 1 of all chunks, then loop 2 of all chunks, and so on.

In loop t the tokens of a prompt attend to the loop-t keys and values of one another, whatever the cache keeps of them
(`_prefill`). Chunk by chunk, each through all loops, that needs T planes. Loop by loop it needs one plane, that of the
pages of the request: loop t of a chunk reads what loop t of the earlier chunks wrote there, and then overwrites what
an earlier loop of the same chunk wrote. In the end a ring has its last loops. For `FIRST` and `AVERAGE`, chunks
accumulate what the cache keeps outside the pages, and write it after the last loop.

Each loop reads its plane of the tokens of a prefix cache too, which come before the prompt.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.config import ModelConfig
from looplm_jax.inference._cache_layout import at_positions, constrain, store_heads
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._kv_cache import Cache
from looplm_jax.inference._prefill import LastToken
from looplm_jax.inference._tick import bound
from looplm_jax.models._blocks import KeyValues
from looplm_jax.models._looplm import LoopLM, Params, compute_dtype


@flax.struct.dataclass
class Chunk:
    """A chunk of a prompt between two of its loops."""

    count: Int[Array, ""]  # tokens; the rest of S is padding
    embedded: Float[Array, "1 S D"]
    state: Float[Array, "1 S D"]
    kept: tuple[KeyValues, KeyValues | None] | None  # of core and coda, [L, 1, S, K, Dh]; None for a ring


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("row",))
def begin_chunk(
    model: LoopLM, params: Params, row: Cache, tokens: Int[Array, "S"], count: Int[Array, ""]
) -> tuple[Cache, Chunk]:
    """Embeds a chunk. The keys and values of a prelude, which runs once, are written to the row.

    Args:
      model: the network.
      params: its parameters.
      row: a row of pages that is filled up to the chunk; donated.
      tokens: the chunk, padded on the right to a static size.
      count: the tokens that are not padding, at least 1.
    """
    apply = bound(model, params)
    context = row.context(model.config, tokens.size)
    past = row.past_prelude(compute_dtype(model.compute))
    embedded, prelude = apply(tokens[None], context, past, True, method="embed")

    if prelude is not None:
        # One token stands for the chunk: a NaN anywhere before it reaches it through attention.
        finite = jnp.isfinite(embedded[0, count - 1]).all()
        row = _write(row, "prelude", prelude, jnp.int32(0), count, finite)

    chunk = Chunk(
        count=jnp.asarray(count),
        embedded=embedded,
        state=apply(embedded, method="initial_state"),
        kept=None if row.strategy.ring else _nothing_kept(model, row.strategy, tokens.size),
    )
    return constrain((row, chunk))


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("row", "chunk", "last"))
def run_loop(
    model: LoopLM, params: Params, row: Cache, chunk: Chunk, last: LastToken, loop: Int[Array, ""]
) -> tuple[Cache, Chunk, LastToken]:
    """Runs one loop of a chunk, and writes its keys and values to the plane of this loop.

    Nothing is written of a chunk whose last state is not finite, because the next owner of a page must find finite
    numbers. What follows such a chunk is not finite either.

    Args:
      model: the network.
      params: its parameters.
      row: a row of pages that is filled up to the chunk; donated.
      chunk: the chunk after `loop` loops; donated.
      last: the states of the last token of the latest chunk, for each loop; donated.
      loop: the number of the loop, from 0.
    """
    apply, count = bound(model, params), chunk.count
    dtype, done = compute_dtype(model.compute), loop[None]
    context = row.context(model.config, chunk.state.shape[1])
    past = row.past(row.planes.core, done, dtype), row.past(row.planes.coda, done, dtype)
    output, core, coda = apply(chunk.state, chunk.embedded, context, loop, *past, True, method="loop_step")

    # `last` is not finite if an earlier chunk has failed.
    hidden = output.hidden[0, count - 1]
    finite = jnp.isfinite(hidden).all() & jnp.isfinite(last.hidden).all()

    plane = loop % row.depth
    row = _write(row, "core", core, plane, count, finite)
    row = _write(row, "coda", coda, plane, count, finite)

    # The keys of `FIRST` and `AVERAGE` are kept outside the row, because later chunks still read loop t from its plane.
    kept = None if chunk.kept is None else _keep(row.strategy, chunk.kept, (core, coda), loop)

    last = LastToken(
        hidden=last.hidden.at[loop].set(jnp.where(finite, hidden, jnp.nan)),
        state=last.state.at[loop].set(output.state[0, count - 1]),
        gate_logits=last.gate_logits.at[loop].set(output.gate_logits[0, count - 1]),
    )
    return constrain((row, dataclasses.replace(chunk, state=output.state, kept=kept), last))


@functools.partial(jax.jit, donate_argnames=("row",))
def write_kept(row: Cache, chunk: Chunk, last: LastToken) -> Cache:
    """Returns the row, which is donated, with what the cache keeps of a chunk after all loops."""
    if chunk.kept is None:
        return row

    loops = last.hidden.shape[0]
    # The sum of all loops becomes their mean.
    divisor = loops if row.strategy == CacheStrategy.AVERAGE else 1
    core, coda = jax.tree.map(lambda kept: kept / divisor, chunk.kept)
    finite, plane = jnp.isfinite(last.hidden).all(), jnp.int32(0)
    row = _write(row, "core", core, plane, chunk.count, finite)
    return constrain(_write(row, "coda", coda, plane, chunk.count, finite))


# Compiled, so that the zeros are made on the devices instead of transferred to them.
@functools.partial(jax.jit, static_argnames=("model", "loops"))
def no_last_token(model: LoopLM, loops: int) -> LastToken:
    """Returns the states of the last token before the first chunk."""
    hidden = jnp.zeros((loops, model.config.width), compute_dtype(model.compute))
    return constrain(LastToken(hidden=hidden, state=hidden, gate_logits=jnp.zeros(loops, jnp.float32)))


def bytes_per_prompt_token(config: ModelConfig, strategy: CacheStrategy, dtype: DTypeLike, *, devices: int = 1) -> int:
    """Returns the bytes, on each of `devices` devices, that a token of a long prompt takes in addition to its page.

    They are needed only while the prompt is read.
    """
    if not strategy.shares:
        return 0
    # The embedding and the state of each token, between two loops.
    states = 2 * config.width * jnp.dtype(dtype).itemsize
    kept = 2 * (config.num_layers + config.coda_layers) * config.kv_heads * config.head_width // devices

    match strategy:
        case CacheStrategy.FIRST:
            return states + kept * jnp.dtype(dtype).itemsize
        case CacheStrategy.AVERAGE:
            return states + kept * jnp.dtype(jnp.float32).itemsize
    return states


def _nothing_kept(model: LoopLM, strategy: CacheStrategy, size: int) -> tuple[KeyValues, KeyValues | None]:
    config = model.config
    # Sums over loops are accumulated in float32, like those of `Cache.write`.
    dtype = jnp.float32 if strategy == CacheStrategy.AVERAGE else compute_dtype(model.compute)

    def zeros(layers: int) -> KeyValues:
        shape = (layers, 1, size, config.kv_heads, config.head_width)
        return KeyValues(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))

    return zeros(config.num_layers), zeros(config.coda_layers) if config.coda_layers else None


def _keep(
    strategy: CacheStrategy,
    before: tuple[KeyValues, KeyValues | None],
    own: tuple[KeyValues, KeyValues | None],
    loop: Int[Array, ""],
) -> tuple[KeyValues, KeyValues | None]:
    """Returns what is kept after one more loop: the first loop, or the sum of all."""
    if strategy == CacheStrategy.AVERAGE:
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), before, own)
    return jax.tree.map(lambda first, new: jnp.where(loop == 0, new, first), before, own)


def _write(
    row: Cache, stack: str, own: KeyValues | None, plane: Int[Array, ""], count: Int[Array, ""], finite: Bool[Array, ""]
) -> Cache:
    """Returns the row with keys and values `[L, 1, S, K, Dh]` of a stack in a plane, after its filled positions."""
    if own is None:
        return row
    numbers = jnp.arange(own.keys.shape[2])
    # Page M does not exist, so writes to it are dropped.
    pages, offsets = row.places(jnp.zeros_like(numbers), row.lengths[0] + numbers)
    pages = jnp.where((numbers < count) & finite, pages, row.pages)

    def put(whole: Float[Array, "L P M c R W"], new: Float[Array, "L 1 S K Dh"]) -> Float[Array, "L P M c R W"]:
        stored = store_heads(new[:, 0], whole.shape).astype(whole.dtype)
        return at_positions(whole, slice(None), plane, pages, offsets).set(stored, mode="drop")

    written = jax.tree.map(put, getattr(row.planes, stack), own)
    return dataclasses.replace(row, planes=dataclasses.replace(row.planes, **{stack: written}))
