"""Continues prompts by self-speculation.

results = speculate(model, params, [[3, 14, 15], [92]], draft_loops=1, drafts=4, max_new_tokens=64)
results[0].tokens, results[0].acceptance_rate, results[0].loops_per_token

With `on_token`, tokens are emitted as soon as they are accepted.
"""

import functools
from collections.abc import Callable, Collection, Sequence

from jax.sharding import Mesh

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.checks import check_request, usable_ids
from looplm_jax.inference.engine_config import EngineConfig
from looplm_jax.inference.field_checks import MOST, token_ids, whole_number
from looplm_jax.inference.kv_cache import CacheStrategy
from looplm_jax.inference.placing import on_mesh
from looplm_jax.inference.requests import NewToken, Request
from looplm_jax.inference.sampling import Sampling
from looplm_jax.inference.speculation.begin import begin
from looplm_jax.inference.speculation.result import SpeculativeResult
from looplm_jax.inference.speculation.rounds import Rounds
from looplm_jax.inference.speculation.row import Row
from looplm_jax.inference.speculation.screening import Screen
from looplm_jax.models.looplm import LoopLM, Params


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

    with on_mesh(mesh):
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
    if cache is not CacheStrategy.FULL:
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
