"""Continue a prompt, token by token, with as many loops for each as the exit policy asks for."""

import dataclasses
import enum
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Float, Int

from looplm_jax.config import ModelConfig
from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference.cache import bucket
from looplm_jax.inference.decode import Decoded, decode_step, prefill
from looplm_jax.inference.sampling import Sampling, sample, token_key
from looplm_jax.inference.traced import Traced
from looplm_jax.models.looplm import LoopLM, Params


class Finish(enum.Enum):
    """Why a generation ended: `max_new_tokens` were made, or a stop token was."""

    LENGTH = "length"
    STOP = "stop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewToken:
    """A token, the loop whose logits it was chosen from, and its log-probability there at temperature 1, nats."""

    token: int
    exit_loop: int
    log_prob: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """The new tokens; a stop token that ended them is the last one. Names as in `NewToken`."""

    tokens: tuple[int, ...]
    exit_loops: tuple[int, ...]
    log_probs: tuple[float, ...]
    prompt_tokens: int
    finished: Finish

    @property
    def mean_loops(self) -> float:
        """Loops a token."""
        return float(np.mean(self.exit_loops))


def generate(
    model: LoopLM,
    params: Params,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    policy: ExitPolicy,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    on_token: Callable[[NewToken], None] | None = None,
) -> Generation:
    """Continue one prompt with a full cache.

    Programs are compiled for buckets of length, not for lengths; other settings of a policy or of `sampling` compile
    nothing, unless they ask for more loops than `config.loops`.

    Args:
      model: the network.
      params: its parameters.
      prompt_ids: at least one token.
      max_new_tokens: at least 1; fewer come where a stop token does.
      policy: the loop at which each token leaves; may ask for more loops than the model was trained with.
      sampling: greedy by default.
      stop_ids: tokens that end the generation.
      on_token: called with every token as soon as it is there.

    Raises:
      UserError: an empty prompt, an id beyond the vocabulary, or more positions than the model has.
    """
    _check(model.config, prompt_ids, max_new_tokens)
    made = []
    for new in _stream(model, params, prompt_ids, max_new_tokens, policy, sampling or Sampling()):
        made.append(new)
        if on_token is not None:
            on_token(new)
        if new.token in stop_ids:
            break
    return Generation(
        tokens=tuple(new.token for new in made),
        exit_loops=tuple(new.exit_loop for new in made),
        log_probs=tuple(new.log_prob for new in made),
        prompt_tokens=len(prompt_ids),
        finished=Finish.STOP if made[-1].token in stop_ids else Finish.LENGTH,
    )


def _stream(
    model: LoopLM, params: Params, prompt_ids: Sequence[int], count: int, policy: ExitPolicy, sampling: Sampling
) -> Iterator[NewToken]:
    traced_policy, traced_sampling = Traced.of(policy), Traced.of(sampling)
    decoded = _prefill_one(model, params, prompt_ids, count, policy)
    for number in range(count):
        choice = _choose(decoded.logits, traced_sampling, number)
        host: Any = jax.device_get((choice, decoded.exit_loops))
        (token,), (log_prob,), (exit_loop,) = host[0].tokens, host[0].log_probs, host[1]
        yield NewToken(token=int(token), exit_loop=int(exit_loop), log_prob=float(log_prob))
        if number + 1 < count:
            decoded = decode_step(model, params, decoded.cache, choice.tokens, traced_policy)


def _prefill_one(model: LoopLM, params: Params, prompt_ids: Sequence[int], count: int, policy: ExitPolicy) -> Decoded:
    longest, size = model.config.max_positions, len(prompt_ids)
    tokens = np.zeros((1, bucket(size, longest)), np.int32)
    tokens[0, :size] = prompt_ids
    return prefill(
        model,
        params,
        tokens,
        np.array([size], np.int32),
        Traced.of(policy),
        loops=max(model.config.loops, policy.max_loops or 0),
        capacity=bucket(size + count, longest),
    )


@flax.struct.dataclass
class _Choice:
    tokens: Int[Array, "1"]
    log_probs: Float[Array, "1"]


@jax.jit
def _choose(logits: Float[Array, "1 V"], sampling: Traced[Sampling], number: Int[Array, ""]) -> _Choice:
    settings = sampling.settings()
    token = sample(logits[0], settings, token_key(settings, number))
    return _Choice(tokens=token[None], log_probs=jax.nn.log_softmax(logits)[:, token])


def _check(config: ModelConfig, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
    if len(prompt_ids) == 0:
        raise UserError("the prompt is empty; give at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    outside = [token for token in prompt_ids if not 0 <= token < config.vocab_size]
    if outside:
        raise UserError(
            f"token {outside[0]} of the prompt is not in the vocabulary of {config.vocab_size} tokens; "
            "use the tokenizer that the model was trained with"
        )
    if len(prompt_ids) + max_new_tokens > config.max_positions:
        raise UserError(
            f"{len(prompt_ids)} tokens of prompt and {max_new_tokens} new ones are beyond "
            f"model.max_positions={config.max_positions}; shorten the prompt or ask for fewer"
        )
