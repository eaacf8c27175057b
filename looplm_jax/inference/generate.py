"""Continues a single prompt: the engine with one slot."""

from collections.abc import Callable, Collection, Sequence

from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference.engine import Engine
from looplm_jax.inference.engine_config import EngineConfig
from looplm_jax.inference.field_checks import token_ids, whole_number
from looplm_jax.inference.kv_cache import bucket
from looplm_jax.inference.requests import NewToken, Result
from looplm_jax.inference.sampling import Sampling
from looplm_jax.models.looplm import LoopLM, Params

_LONGEST_CHUNK = 512


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
) -> Result:
    """Continues one prompt with a full cache.

    Programs are compiled for buckets of lengths, not for each length. Other settings of a policy or of `sampling`
    compile nothing, unless they need more loops than `config.loops` or are of another kind.

    Args:
      model: the network.
      params: its parameters.
      prompt_ids: at least one token.
      max_new_tokens: at least 1; a stop token may end the text earlier.
      policy: decides the loop at which each token exits; it may use more loops than the trained depth.
      sampling: greedy by default.
      stop_ids: tokens that end the generation.
      on_token: called with every token as soon as it is chosen.

    Raises:
      UserError: the prompt is empty, an id is outside the vocabulary, or the model has too few positions.
    """
    longest, prompt_ids = model.config.max_positions, token_ids("prompt_ids", prompt_ids)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
    if not isinstance(policy, ExitPolicy) or isinstance(policy, type):
        raise UserError(f"policy must be an exit policy, such as QExit(q=0.5), not {policy!r}")

    config = EngineConfig(
        slots=1,
        capacity=bucket(min(max(len(prompt_ids) + max_new_tokens, 1), longest), longest),
        # More planes than the trained depth only if the policy uses them.
        loops=max(model.config.loops, policy.max_loops or 0),
        chunk=min(_LONGEST_CHUNK, longest),
        unroll=False,
    )

    return Engine(model, params, config=config).generate(
        [prompt_ids],
        max_new_tokens=max_new_tokens,
        policy=policy,
        sampling=sampling or Sampling(),
        stop_ids=tuple(stop_ids),
        on_token=on_token,
    )[0]
