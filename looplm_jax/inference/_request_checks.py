"""Converts the arguments of callers to requests, and refuses requests that an engine can never serve."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from looplm_jax.config import GatePlacement, ModelConfig
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.halting import Bounded, ExitPolicy
from looplm_jax.halting.signals import Needs
from looplm_jax.inference._cache_layout import stored_heads, use_mesh_or_none
from looplm_jax.inference._engine_config import EngineConfig
from looplm_jax.inference._field_checks import real_number, whole_number
from looplm_jax.inference._requests import PrefixCache, Request
from looplm_jax.inference._sampling import Sampling
from looplm_jax.inference._slots import MOST_STOP_IDS

# Prompts to requests


Prompt = str | Sequence[int]


def make_requests(
    prompts: Prompt | Sequence[Prompt],
    tokenizer: Tokenizer | None,
    *,
    samples: int,
    sampling: Sampling,
    **fields: Any,
) -> list[Request]:
    """Returns `samples` requests per prompt, those of one prompt adjacent, each with its own random keys.

    Args:
      prompts: texts, or lists of token ids; a single text, or a single list of ids, is one prompt.
      tokenizer: encodes texts.
      samples: the number of requests per prompt.
      sampling: equal for all requests except for `index` and `sample`.
      **fields: further fields of `Request`, equal for all requests.

    Raises:
      UserError: a prompt or a field is invalid.
    """
    # Checked here, because `Request` knows nothing of samples.
    samples = whole_number("samples", samples, least=1)
    return [
        Request(prompt_ids=prompt_ids, sampling=_numbered(sampling, index, sample), **fields)
        for index, prompt_ids in enumerate(_encoded(prompt, tokenizer) for prompt in _several(prompts))
        for sample in range(samples)
    ]


def _numbered(sampling: Any, index: int, sample: int) -> Any:
    """Returns the sampling settings of one request."""
    return sampling.numbered(index, sample) if isinstance(sampling, Sampling) else sampling  # `Request` refuses others


def _several(prompts: Any) -> list[Any]:
    """Returns a list of prompts. Raises UserError if there is no list."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, bytes | bytearray | Mapping | set | frozenset) or not isinstance(prompts, Iterable):
        raise UserError(f"prompts must be a list of texts or of lists of token ids, not {type(prompts).__name__}")

    found = list(prompts)
    # A list of integers is one prompt.
    one = bool(found) and all(isinstance(own, int | np.integer) or getattr(own, "ndim", None) == 0 for own in found)
    return [found] if one else found


def _encoded(prompt: Any, tokenizer: Tokenizer | None) -> Any:
    """Returns the token ids of a text, after a bos token; other prompts are returned unchanged."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise UserError("text needs a tokenizer: Engine(model, params, tokenizer); or give token ids")
    return (tokenizer.bos_id, *tokenizer.encode(prompt))


# Checks against the model and the engine


def usable_ids(model: ModelConfig, tokenizer: Tokenizer | None) -> int:
    """Returns how many ids may be read and chosen: an embedding may be padded beyond the tokenizer's vocabulary."""
    return model.vocab_size if tokenizer is None else min(model.vocab_size, tokenizer.vocab_size)


def check_request(
    request: Request, model: ModelConfig, engine: EngineConfig, tokenizer: Tokenizer | None, mesh: Mesh | None = None
) -> None:
    """Raises UserError, in one line, for a request that does not fit the model or the engine."""
    if not isinstance(request, Request):
        raise UserError(f"what is submitted must be a Request, not {type(request).__name__}; see Engine.requests")

    loops = engine.loops or model.loops
    _check_tokens(request, model, usable_ids(model, tokenizer))
    _check_past(request.past, model, engine.cache.planes(loops), mesh)

    total = request.max_tokens
    wanted = f"{total - request.max_new_tokens} tokens of prompt and {request.max_new_tokens} new ones"
    if total > model.max_positions:
        raise UserError(
            f"{wanted} are beyond model.max_positions={model.max_positions}; shorten the prompt or ask for fewer"
        )
    if total > engine.capacity:
        raise UserError(f"{wanted} do not fit a cache of {engine.capacity}; use EngineConfig(capacity={total})")

    # A request that needs more pages than there are would wait forever.
    pool = engine.pool
    if pool.needed(total) > pool.pages:
        raise UserError(
            f"{wanted} take {pool.needed(total)} pages of {pool.page_size} tokens, and the cache has {pool.pages}: "
            f"{pool.needed(total) - pool.pages} are missing; use EngineConfig(pages={pool.needed(total)})"
        )

    if request.policy is not None:
        _check_numbers(request.policy)
    _check_policy(request.policy, loops)
    check_gate(request.policy, model)

    if len(request.stop_ids) > MOST_STOP_IDS:
        raise UserError(f"at most {MOST_STOP_IDS} stop_ids, not {len(request.stop_ids)}; use stop_strings for more")
    if request.stop_strings and tokenizer is None:
        raise UserError("stop strings need a tokenizer to find them by; give one, or use stop_ids")


def _check_numbers(policy: ExitPolicy) -> None:
    """Raises UserError for numbers of a wrong type, which would be rounded, or fail, in a table of policies."""
    if isinstance(policy, Bounded):
        _check_numbers(policy.policy)
        whole_number("min_loops", policy.min_loops, least=1)
        if policy.max_loops is not None:
            whole_number("max_loops", policy.max_loops, least=1)
        return

    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    for field in fields:
        name, value = f"{field.name} of {type(policy).__name__}", getattr(policy, field.name)
        if field.type in (int, "int"):
            whole_number(name, value)
        elif field.type in (float, "float") and math.isnan(real_number(name, value)):
            raise UserError(f"{name} must be a number, not nan")


def _check_past(past: PrefixCache | None, model: ModelConfig, loops: int, mesh: Mesh | None) -> None:
    """Raises UserError unless a prefix cache has the shapes of this engine's cache, which keeps `loops` loops."""
    if past is None:
        return

    # Heads are stored differently on TPUs, and a mesh says what platform this is.
    with use_mesh_or_none(mesh):
        own_heads, own_width = stored_heads(model.kv_heads, model.head_width)
    # The capacity may differ: the row is copied into this engine's pages.
    layers, planes, rows, _, heads, width = past.row.planes.core.keys.shape
    wanted = (model.num_layers, loops, 1, own_heads, own_width)
    if (layers, planes, rows, heads, width) != wanted:
        raise UserError(
            f"the prefix cache has {layers} layers, {planes} loops and {heads} heads of {width}, this engine "
            f"{model.num_layers}, {loops} and {own_heads} of {own_width}; use the engine it comes from"
        )

    # Arrays are deleted when they are donated to a program.
    if past.row.lengths.is_deleted():
        raise UserError("the arrays of the prefix cache were deleted; send the whole text again")


def _check_policy(policy: ExitPolicy | None, loops: int) -> None:
    """Raises UserError for a policy that needs more loops than the engine has."""
    most = None if policy is None else policy.max_loops
    if most is not None and most > loops:
        raise UserError(f"{most} loops are more than the {loops} of this engine; use EngineConfig(loops={most})")
    if isinstance(policy, Bounded) and policy.min_loops > loops:
        floor = policy.min_loops
        raise UserError(
            f"a floor of {floor} loops is above the {loops} of this engine; "
            f"lower it, or use EngineConfig(loops={floor})"
        )


def check_gate(policy: ExitPolicy | None, model: ModelConfig) -> None:
    """Raises UserError for a policy that reads the gate of a model without one."""
    if policy is not None and model.gate is GatePlacement.NONE and Needs.GATE in policy.needs:
        raise UserError(
            f"{type(policy).__name__} reads the exit gate, and the model has none (model.gate=none); "
            "use fixed loops, or a policy that reads states or predictions"
        )


def _check_tokens(request: Request, model: ModelConfig, usable: int) -> None:
    """Raises UserError for ids outside the vocabulary."""
    outside = [token for token in request.prompt_ids if not 0 <= token < usable]
    if outside:
        raise UserError(
            f"token {outside[0]} of the prompt is not in the vocabulary of {usable} tokens; "
            "use the tokenizer that the model was trained with"
        )

    unknown = [token for token in request.stop_ids if token >= model.vocab_size]
    if unknown:
        raise UserError(
            f"stop id {unknown[0]} is not in the vocabulary of {model.vocab_size} tokens, so nothing would end at it; "
            "leave it out"
        )
