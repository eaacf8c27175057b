"""Converts the harness's requests for text to requests of the engine, and runs them."""

import collections
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError, suggest
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Request, Result, Sampling
from looplm_jax.inference._field_checks import real_number, whole_number
from looplm_jax.inference._kv_cache import bucket
from looplm_jax.loading import Loaded

NEW_TOKENS = 256  # if a task does not specify it, as for the harness's own models
_TOP_K = 50  # the same for sampled tokens: the default of `transformers`
_LONGEST_CHUNK = 512
_OF_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_KEYS = 2**31
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1}  # arguments that tasks set for other engines


# From the harness to the engine


def generation_request(
    prompt_ids: Sequence[int],
    generation_kwargs: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    policy: ExitPolicy,
    longest: int,
) -> Request:
    """Returns a request whose prompt is truncated on the left to leave room for the new tokens.

    The harness's Hugging Face model truncates in the same way.

    Args:
      prompt_ids: at least one token.
      generation_kwargs: arguments of a task: `until`, `max_gen_toks` under any of its names, `do_sample`, and the
        fields of `Sampling`.
      tokenizer: its end-of-text tokens also end a generation.
      policy: decides the loop at which each token exits.
      longest: the number of tokens that the model reads.

    Raises:
      UserError: an argument is not known, or no room is left for a prompt.
    """
    given = {name: value for name, value in generation_kwargs.items() if value is not None}
    _check_names(given)

    lengths = [given[name] for name in _OF_LENGTH if name in given]
    new_tokens = whole_number("max_gen_toks", lengths[0], least=1) if lengths else NEW_TOKENS
    if new_tokens >= longest:
        raise UserError(
            f"{new_tokens} new tokens leave no room for a prompt in the {longest} that the model reads; "
            "ask for fewer with generation_kwargs max_gen_toks"
        )

    until = given.get("until", [])
    return Request(
        prompt_ids=tuple(prompt_ids[-(longest - new_tokens) :]),
        max_new_tokens=new_tokens,
        policy=policy,
        sampling=_sampling(given),
        stop_ids=tuple(stop_ids(tokenizer)),
        # An empty stop string would end every text at once.
        stop_strings=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def with_own_keys(requests: Sequence[Request]) -> list[Request]:
    """Returns the requests, each with its own random keys. Repeats of a prompt are its samples 0, 1, ...

    Keys derive from the prompt and the number of the repeat, so that neither the order of the requests nor the other
    requests affect an answer.
    """
    seen: collections.Counter[tuple[int, ...]] = collections.Counter()
    numbered = []
    for request in requests:
        # "<i4": the digest must not depend on the byte order of the machine.
        digest = hashlib.sha256(np.asarray(request.prompt_ids, "<i4").tobytes()).digest()
        index, sample = int.from_bytes(digest[:4], "big") % _KEYS, seen[request.prompt_ids]
        seen[request.prompt_ids] += 1

        sampling = dataclasses.replace(request.sampling, index=index, sample=sample)
        numbered.append(dataclasses.replace(request, sampling=sampling))
    return numbered


def generate_texts(
    loaded: Loaded, requests: Sequence[Request], *, slots: int, loops: int, cache: CacheStrategy
) -> list[Result]:
    """Returns the engine's results for at least one request. Raises UserError if a request failed."""
    longest = loaded.model.config.max_positions

    # The cache is as large as the longest request needs, rounded up so that few shapes are compiled.
    window = bucket(max(len(request.prompt_ids) + request.max_new_tokens for request in requests), longest)
    config = EngineConfig(
        slots=min(slots, len(requests)),
        capacity=window,
        loops=loops,
        cache=cache,
        chunk=min(_LONGEST_CHUNK, window),
        queue=len(requests),
    )

    engine = Engine(loaded.model, loaded.params, loaded.need_tokenizer(), config=config)
    handles = [engine.submit(request) for request in requests]
    while engine.step():
        pass

    results = [handle.result() for handle in handles]
    for result in results:
        if result.finish is Finish.FAILED:
            raise UserError(result.error)
    return results


# Checks of generation_kwargs


def _check_names(given: Mapping[str, Any]) -> None:
    """Raises UserError for arguments that have no effect here."""
    known = ("until", "do_sample", *_OF_LENGTH, *_SAMPLING)
    for name, value in given.items():
        if name not in known and _NEUTRAL.get(name) != value:
            raise UserError(f"generation_kwargs {name}={value!r} is not supported{suggest(name, known)}")


def _sampling(given: Mapping[str, Any]) -> Sampling:
    """Returns greedy sampling unless the task asks for `do_sample`, or omits it and sets a temperature."""
    settings = {name: given[name] for name in _SAMPLING if name in given}
    temperature = real_number("temperature", settings.pop("temperature", 0.0))
    if not given.get("do_sample", temperature > 0):
        return Sampling(**settings)
    if temperature == 0:
        raise UserError("generation_kwargs do_sample=True needs a temperature above 0; 0 takes the likeliest token")
    # The task's own top_k replaces the default.
    return Sampling(**{"temperature": temperature, "top_k": _TOP_K, **settings})
