"""Prefill of a speculative batch: prompts of any lengths, without their last tokens, which the first round reads."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from looplm_jax.inference.kv_cache import Cache, CacheStrategy, bucket, empty_cache
from looplm_jax.inference.placing import placed, put
from looplm_jax.inference.requests import Request
from looplm_jax.inference.sampling import SamplingTable
from looplm_jax.inference.speculation.step import SpeculativeRows, read
from looplm_jax.models.looplm import LoopLM, Params, compute_dtype

_LONGEST_CHUNK = 128


def begin(
    model: LoopLM, params: Params, requests: Sequence[Request], loops: int, usable: int, mesh: Mesh | None = None
) -> SpeculativeRows:
    """Returns rows with a full cache of `loops` planes that have read the prompts, in chunks.

    Ids from `usable` on are never chosen.
    """
    rows = _empty(model, requests, loops, usable, mesh)
    prompts = [request.prompt_ids[:-1] for request in requests]
    longest = max(len(prompt) for prompt in prompts)
    # A chunk size from few buckets, so that few programs are compiled.
    size = bucket(max(longest, 1), min(_LONGEST_CHUNK, rows.cache.capacity))

    for start in range(0, longest, size):
        part = pad([prompt[start : start + size] for prompt in prompts], size)
        rows = read(model, params, rows, part.tokens, part.counts)
    return rows


@dataclasses.dataclass(frozen=True)
class Padded:
    """Sequences of different lengths in one array; the first `counts[n]` of `tokens[n]` are valid."""

    tokens: Int[np.ndarray, "N S"]
    counts: Int[np.ndarray, "N"]


def pad(sequences: Sequence[Sequence[int]], size: int) -> Padded:
    """Pads sequences of at most `size` tokens on the right."""
    tokens = np.zeros((len(sequences), size), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return Padded(tokens=tokens, counts=np.array([len(sequence) for sequence in sequences], np.int32))


def _empty(model: LoopLM, requests: Sequence[Request], loops: int, usable: int, mesh: Mesh | None) -> SpeculativeRows:
    """Returns rows with an empty cache, on their devices."""
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)

    def make() -> Cache:
        return empty_cache(
            model.config,
            CacheStrategy.FULL,
            rows=len(requests),
            capacity=bucket(longest, model.config.max_positions),
            loops=loops,
            dtype=compute_dtype(model.compute),
        )

    rows = SpeculativeRows(
        cache=placed(make, mesh),
        tokens=jnp.asarray([request.prompt_ids[-1] for request in requests], jnp.int32),
        made=jnp.zeros(len(requests), jnp.int32),
        sampling=SamplingTable.of_all([request.sampling for request in requests], usable),
        seen=_seen(requests, model.config.vocab_size),
    )
    return put(rows, mesh)


def _seen(requests: Sequence[Request], vocab_size: int) -> Bool[Array, "N V"] | None:
    """Returns a mask of the tokens in each prompt, or None if no row has a repetition penalty."""
    if all(request.sampling.repetition_penalty == 1 for request in requests):
        return None
    # On the host: one transfer instead of a scatter per prompt.
    seen = np.zeros((len(requests), vocab_size), bool)
    for row, request in zip(seen, requests, strict=True):
        row[list(request.prompt_ids)] = True
    return jnp.asarray(seen)
