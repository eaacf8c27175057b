"""Requests that an engine can never serve, refused before they wait for anything."""

from looplm_jax.config import ModelConfig
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.halting import Bounded, ExitPolicy
from looplm_jax.inference.decoder import EngineConfig
from looplm_jax.inference.requests import Request
from looplm_jax.inference.slots import MOST_STOP_IDS


def check_request(request: Request, model: ModelConfig, engine: EngineConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError, in one line, for a request that does not fit the model or the engine."""
    _check_tokens(request, model)
    before = 0 if request.past is None else len(request.past)
    wanted = f"{before + len(request.prompt_ids)} tokens of prompt and {request.max_new_tokens} new ones"
    total = before + len(request.prompt_ids) + request.max_new_tokens
    if total > model.max_positions:
        raise UserError(
            f"{wanted} are beyond model.max_positions={model.max_positions}; shorten the prompt or ask for fewer"
        )
    if total > engine.capacity:
        raise UserError(f"{wanted} do not fit a cache of {engine.capacity}; use EngineConfig(capacity={total})")
    _check_policy(request.policy, engine.loops or model.loops)
    if len(request.stop_ids) > MOST_STOP_IDS:
        raise UserError(f"at most {MOST_STOP_IDS} stop_ids, not {len(request.stop_ids)}; use stop_strings for more")
    if request.stop_strings and tokenizer is None:
        raise UserError("stop strings need a tokenizer to find them by; give one, or use stop_ids")


def _check_policy(policy: ExitPolicy | None, loops: int) -> None:
    most = None if policy is None else policy.max_loops
    if most is not None and most > loops:
        raise UserError(f"{most} loops are more than the {loops} of this engine; use EngineConfig(loops={most})")
    if isinstance(policy, Bounded) and policy.min_loops > loops:
        floor = policy.min_loops
        raise UserError(
            f"a floor of {floor} loops is above the {loops} of this engine; "
            f"lower it, or use EngineConfig(loops={floor})"
        )


def _check_tokens(request: Request, model: ModelConfig) -> None:
    outside = [token for token in request.prompt_ids if not 0 <= token < model.vocab_size]
    if outside:
        raise UserError(
            f"token {outside[0]} of the prompt is not in the vocabulary of {model.vocab_size} tokens; "
            "use the tokenizer that the model was trained with"
        )
