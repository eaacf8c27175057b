"""Converts the arguments of the engine's callers to requests: one or several prompts, each with one or more samples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference.field_checks import whole_number
from looplm_jax.inference.requests import Request
from looplm_jax.inference.sampling import Sampling

Prompt = str | Sequence[int]


def make_requests(
    prompts: Prompt | Sequence[Prompt], tokenizer: Tokenizer | None, *, samples: int = 1, **options: Any
) -> list[Request]:
    """Returns `samples` requests per prompt, those of one prompt adjacent, each with its own random keys.

    Args:
      prompts: texts, or lists of token ids; a single text, or a single list of ids, is one prompt.
      tokenizer: encodes texts.
      samples: the number of requests per prompt.
      **options: fields of `Request`, equal for all requests except for `index` and `sample` of `sampling`.

    Raises:
      UserError: a prompt or an option is invalid.
    """
    samples = whole_number("samples", samples, least=1)
    sampling = options.pop("sampling", Sampling())
    return [
        Request(prompt_ids=prompt_ids, sampling=_numbered(sampling, index, sample), **options)
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
