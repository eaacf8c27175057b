"""Generation: an engine whose passes serve tokens at any depth, with caches, sampling, streaming and early exit.

    >>> import jax
    >>> from looplm_jax.halting import QExit
    >>> from looplm_jax.inference import Engine, EngineConfig, Sampling
    >>> from looplm_jax.models import LoopLM, init_params, presets
    >>> model = LoopLM(presets.tiny())
    >>> engine = Engine(model, init_params(model, jax.random.key(0)), config=EngineConfig(slots=2, capacity=32))
    >>> prompts = [[3, 14], [15, 9, 2]]
    >>> results = engine.generate(prompts, max_new_tokens=4, policy=QExit(q=0.5), sampling=Sampling(temperature=1.0))
    >>> [len(result.tokens) for result in results]
    [4, 4]

With a tokenizer, prompts may be text, and results have text: for `loaded = looplm_jax.load(folder)`, the engine is
`Engine(loaded.model, loaded.params, loaded.tokenizer)`.

The engine: `Engine`, its size `EngineConfig`, its counters `EngineStats`; `generate` for a single prompt.

Requests: `Request` and its `Sampling`; the `RequestHandle` that `Engine.submit` returns; each `NewToken`; the `Result`
and its `Finish`. A result may keep a `PrefixCache`, with a `CachedTurn` for each request in it, which another request
continues; `Conversation` does so for a chat.

The cache: `CacheStrategy` chooses the loops of a token that it keeps, and `bytes_per_token` computes its size.

Self-speculation: `speculate` drafts with few loops and verifies with all; its `SpeculativeResult`; a `Screening` of
drafts may stop a row, or `Reroute` it.

Log-probabilities of generated tokens for training: `replay` for a result; `replay_scores`, a differentiable function of
the parameters, for a batch of `Rollouts`. Its `Scores` are those of tokens and of their exits, and `rollout_gap` is
their distance from those of the engine; `replay_log_probs` returns those of the tokens alone.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # The cache.
    from looplm_jax.inference._cache_strategy import CacheStrategy

    # Chats, whose cache is kept between turns.
    from looplm_jax.inference._conversation import Conversation

    # The engine.
    from looplm_jax.inference._engine import Engine, generate
    from looplm_jax.inference._engine_config import EngineConfig, EngineStats
    from looplm_jax.inference._kv_cache import bytes_per_token

    # Log-probabilities of generated tokens.
    from looplm_jax.inference._replay import Scores, replay, replay_log_probs, replay_scores, rollout_gap

    # Requests and results.
    from looplm_jax.inference._requests import CachedTurn, NewToken, PrefixCache, Request, Result
    from looplm_jax.inference._rollouts import Rollouts
    from looplm_jax.inference._running import RequestHandle
    from looplm_jax.inference._sampling import Sampling
    from looplm_jax.inference._stopping import Finish

    # Self-speculation.
    from looplm_jax.inference.speculation._rows import Reroute, Screening, SpeculativeResult
    from looplm_jax.inference.speculation._speculate import speculate

__all__ = [
    "CacheStrategy",
    "CachedTurn",
    "Conversation",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Finish",
    "NewToken",
    "PrefixCache",
    "Request",
    "RequestHandle",
    "Reroute",
    "Result",
    "Rollouts",
    "Sampling",
    "Scores",
    "Screening",
    "SpeculativeResult",
    "bytes_per_token",
    "generate",
    "replay",
    "replay_log_probs",
    "replay_scores",
    "rollout_gap",
    "speculate",
]
