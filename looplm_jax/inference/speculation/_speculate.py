"""Continues prompts by self-speculation.

    results = speculate(model, params, [[3, 14, 15], [92]], draft_loops=1, drafts=4, max_new_tokens=64)
    results[0].tokens, results[0].acceptance_rate, results[0].loops_per_token

With `on_token`, tokens are emitted as soon as they are accepted.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference._cache_layout import init_sharded, shard, use_mesh_or_none
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._engine_config import EngineConfig
from looplm_jax.inference._field_checks import MOST, token_ids, whole_number
from looplm_jax.inference._kv_cache import Cache, bucket, empty_cache
from looplm_jax.inference._request_checks import check_request, usable_ids
from looplm_jax.inference._requests import NewToken, Request
from looplm_jax.inference._sampling import Sampling, SamplingTable
from looplm_jax.inference.speculation._rows import Row, Screen, SpeculativeResult
from looplm_jax.inference.speculation._verify import Draft, SpeculativeRows, Verified, draft, force, read, verify_drafts
from looplm_jax.models._looplm import LoopLM, Params, check_loops, compute_dtype, for_calls

# Prompt tokens per program; all rows of a batch read their chunks together.
_LONGEST_CHUNK = 128


def speculate(
    model: LoopLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    draft_loops: int,
    drafts: int,
    max_new_tokens: int,
    loops: int | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_ids: Collection[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[int, NewToken], None] | None = None,
    screen: Screen | None = None,
    cache: CacheStrategy = CacheStrategy.FULL,
    mesh: Mesh | None = None,
) -> list[SpeculativeResult]:
    """Continues prompts of any lengths in one batch. No row affects another.

    Greedy tokens equal those of `FixedLoops(T)`, unless rounding decides between two equally probable tokens. Sampled
    tokens have the same distribution as those of `FixedLoops(T)`, but differ for a given seed.

    Args:
      model: the network; on a CPU, one with `unrolled` and the matching parameters is faster.
      params: its parameters.
      prompts: token ids, at least one per prompt.
      draft_loops: the loop s whose predictions are the drafts.
      drafts: the number of drafts before a verification, k.
      max_new_tokens: at least 1; a stop token may end a row earlier.
      loops: the loop T whose predictions count; default: the trained depth.
      sampling: greedy by default. Either one for all rows, whose `index` is then incremented from row to row, or one
        per row, used unchanged. Random keys depend only on it and on the number of the token.
      stop_ids: tokens that end a row.
      stop_strings: texts that end a row, and are not part of its text; they require a tokenizer.
      tokenizer: decodes the text of rows; without one the text is empty.
      on_token: called with the index of a row and a new token, as soon as the token is final: after each round for the
        tokens that it added, in order. If it raises, that row fails and the others continue.
      screen: called with every row's drafts before any of them is emitted. The corrected token that follows rejected
        drafts is not included. If it raises, that row fails and the others continue.
      cache: must be full: loops s+1..T of a draft have their own keys and values.
      mesh: the mesh of the parameters; keys and values are sharded over their heads.

    Raises:
      UserError: a prompt cannot be served, `draft_loops` is outside 1..T-1, `drafts` is below 1, or the cache is not
        full.
    """
    loops = model.config.loops if loops is None else whole_number("loops", loops, least=1)
    # A negative `draft_loops` is an integer too; _check names its allowed range.
    draft_loops, drafts = whole_number("draft_loops", draft_loops, least=-MOST), whole_number("drafts", drafts, least=1)
    _check(draft_loops, loops, cache)
    check_loops(model.config, loops)
    model = for_calls(model, loops)

    if isinstance(prompts, str):
        raise UserError("prompts must be lists of token ids, not text; encode it with the tokenizer")

    # Checked like requests of an engine that has room for every position of the model.
    size = EngineConfig(capacity=model.config.max_positions, loops=loops)
    rows = []
    for index, (prompt, own) in enumerate(zip(prompts, _samplings(sampling, len(prompts)), strict=True)):
        request = Request(
            prompt_ids=token_ids("prompt_ids", prompt),
            max_new_tokens=max_new_tokens,
            sampling=own,
            stop_ids=tuple(stop_ids),
            stop_strings=stop_strings,  # type: ignore[arg-type]  # a lone string is refused there
            on_token=None if on_token is None else functools.partial(on_token, index),
        )
        check_request(request, model.config, size, tokenizer)
        rows.append(Row(index, request, loops, tokenizer))

    with use_mesh_or_none(mesh):
        if rows:
            usable = usable_ids(model.config, tokenizer)
            state = begin(model, params, [row.request for row in rows], loops, usable, mesh)
            Rounds(
                model=model,
                params=params,
                rows=rows,
                state=state,
                draft_loops=draft_loops,
                drafts=drafts,
                screen=screen,
                usable=usable,
            ).run()

    return [row.result() for row in rows]


def _check(draft_loops: int, loops: int, cache: CacheStrategy) -> None:
    """Raises UserError for loops or a cache with which drafts cannot be verified."""
    if loops < 2:
        raise UserError(f"self-speculation needs at least 2 loops, not {loops}; generate without it")
    if not 1 <= draft_loops < loops:
        raise UserError(f"draft_loops must be in 1..{loops - 1} to be verified by loop {loops}, not {draft_loops}")
    if cache != CacheStrategy.FULL:
        raise UserError(
            f"self-speculation needs a full cache, not {cache.value!r}: each loop reads keys and values of its own"
        )


def _samplings(sampling: Sampling | Sequence[Sampling] | None, rows: int) -> Sequence[Sampling]:
    """Returns the settings of each row."""
    if sampling is None or isinstance(sampling, Sampling):
        # As `generate` numbers the prompts of a call.
        return [(sampling or Sampling()).numbered(index) for index in range(rows)]
    if len(sampling) != rows:
        raise UserError(f"{len(sampling)} samplings for {rows} prompts; give one for all, or one for each")
    return sampling


# Rounds


@dataclasses.dataclass(kw_only=True)
class Rounds:
    """A running batch: its rows on the host, and their state on the device."""

    model: LoopLM
    params: Params
    rows: Sequence[Row]
    state: SpeculativeRows
    draft_loops: int
    drafts: int
    screen: Screen | None
    usable: int  # ids below this may be inserted by a screen

    def run(self) -> None:
        """Drafts and verifies until every row has ended. Rows that have ended are idle in the meantime."""
        while not all(row.done for row in self.rows):
            drafted = self._draft()
            # The screen sees all rows before any of them is verified.
            forced = self._screen(drafted)
            self._verify(drafted, [row for row in self.rows if not row.done and not forced[row.index]])
            self._force(forced)

    def _draft(self) -> Draft:
        """Drafts tokens for all rows, and counts the passes of those that are not done."""
        for row in self.rows:
            row.passes += 0 if row.done else self.drafts * self.draft_loops
        self.state, drafted = draft(self.model, self.params, self.state, loops=self.draft_loops, drafts=self.drafts)
        return drafted

    def _screen(self, drafted: Draft) -> list[tuple[int, ...]]:
        """Returns, for each row, the tokens that the screen substitutes for its drafts, if any."""
        if self.screen is None:
            return [()] * len(self.rows)
        # The only transfer of drafts to the host; without a screen it is skipped.
        drafts = jax.device_get(drafted.tokens).tolist()
        return [() if row.done else row.screen(self.screen, drafts[row.index], self.usable) for row in self.rows]

    def _verify(self, drafted: Draft, rows: Sequence[Row]) -> None:
        """Verifies the drafts of some rows."""
        if not rows:
            return
        self.state, verified = verify_drafts(
            self.model, self.params, self.state, drafted, self._mask(rows), draft_loops=self.draft_loops
        )
        # One transfer per round.
        found = jax.device_get(verified)
        for row in rows:
            row.passes += self.state.cache.depth - self.draft_loops
            row.verify(_of(found, row))

    def _force(self, forced: Sequence[tuple[int, ...]]) -> None:
        """Appends the screen's tokens, in chunks of the size of a draft, so that one program serves all."""
        for start in range(0, max(len(tokens) for tokens in forced), self.drafts):
            chunk = pad([tokens[start : start + self.drafts] for tokens in forced], self.drafts)
            self.state, forced_tokens = force(self.model, self.params, self.state, chunk.tokens, chunk.counts)

            found = jax.device_get(forced_tokens)
            for row in self.rows:
                if chunk.counts[row.index]:
                    row.passes += self.state.cache.depth
                    row.extend(_of(found, row))

    def _mask(self, rows: Sequence[Row]) -> Bool[np.ndarray, "N"]:
        """Returns a mask of some rows."""
        mask = np.zeros(len(self.rows), bool)
        mask[[row.index for row in rows]] = True
        return mask


def _of(found: Verified, row: Row) -> Verified:
    """Returns the entry of one row."""
    return jax.tree.map(lambda x: x[row.index], found)


# Prefill


def begin(
    model: LoopLM, params: Params, requests: Sequence[Request], loops: int, usable: int, mesh: Mesh | None = None
) -> SpeculativeRows:
    """Returns rows with a full cache of `loops` planes that have read the prompts, in chunks.

    Ids from `usable` on are never chosen.
    """
    rows = _empty(model, requests, loops, usable, mesh)
    # The last token of a prompt is the first input of a draft.
    prompts = [request.prompt_ids[:-1] for request in requests]
    longest = max(len(prompt) for prompt in prompts)
    # A chunk size from few buckets, so that few programs are compiled.
    size = bucket(max(longest, 1), min(_LONGEST_CHUNK, rows.cache.capacity))

    # Rows with shorter prompts read padding in the later chunks, which is not counted.
    for start in range(0, longest, size):
        chunk = pad([prompt[start : start + size] for prompt in prompts], size)
        rows = read(model, params, rows, chunk.tokens, chunk.counts)
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
        cache=init_sharded(make, mesh),
        tokens=jnp.asarray([request.prompt_ids[-1] for request in requests], jnp.int32),
        num_generated=jnp.zeros(len(requests), jnp.int32),
        sampling=SamplingTable.of_all([request.sampling for request in requests], usable),
        seen_tokens=_seen(requests, model.config.vocab_size),
    )
    return shard(rows, mesh)


def _seen(requests: Sequence[Request], vocab_size: int) -> Bool[Array, "N V"] | None:
    """Returns a mask of the tokens in each prompt, or None if no row has a repetition penalty."""
    if all(request.sampling.repetition_penalty == 1 for request in requests):
        return None
    # On the host: one transfer instead of a scatter per prompt.
    seen = np.zeros((len(requests), vocab_size), bool)
    for row, request in zip(seen, requests, strict=True):
        row[list(request.prompt_ids)] = True
    return jnp.asarray(seen)
