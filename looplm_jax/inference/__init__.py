"""Generation: an engine whose passes serve tokens at any depth, with caches, sampling, streaming and early exit."""

from looplm_jax.inference.conversation import Conversation
from looplm_jax.inference.engine import Engine
from looplm_jax.inference.engine_config import EngineConfig
from looplm_jax.inference.generate import generate
from looplm_jax.inference.kept_cache import KeptCache, Turn
from looplm_jax.inference.kv_cache import CacheStrategy, bytes_per_token
from looplm_jax.inference.replay import replay, replay_log_probs
from looplm_jax.inference.requests import NewToken, Request, Result
from looplm_jax.inference.sampling import Sampling
from looplm_jax.inference.speculation import Reroute, Screening, SpeculativeResult, speculate
from looplm_jax.inference.stats import EngineStats
from looplm_jax.inference.stopping import Finish
from looplm_jax.inference.ticket import Ticket

__all__ = [
    "CacheStrategy",
    "Conversation",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Finish",
    "KeptCache",
    "NewToken",
    "Request",
    "Reroute",
    "Result",
    "Sampling",
    "Screening",
    "SpeculativeResult",
    "Ticket",
    "Turn",
    "bytes_per_token",
    "generate",
    "replay",
    "replay_log_probs",
    "speculate",
]
