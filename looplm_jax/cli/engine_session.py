"""From the arguments that `looplm generate` and `looplm chat` share to an engine and to requests."""

import argparse
from typing import Any

from rich.console import Console
from rich.status import Status

from looplm_jax.halting import parse_exit_policy
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Sampling
from looplm_jax.loading import Loaded
from looplm_jax.printing import complain

_LONGEST_CHUNK = 512


def request_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Request`. Raises UserError for numbers that cannot be."""
    return {
        "policy": parse_exit_policy(arguments.exit),
        "sampling": Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
        ),
        "stop_strings": tuple(arguments.stop),
        "loops_per_token": arguments.loops_per_token,
        "milliseconds_per_token": arguments.ms_per_token,
    }


def sign_of_life() -> Status:
    """For a terminal, until the first token is there."""
    return Console(stderr=True).status("compiling for this length of prompt")


def most_loops(loaded: Loaded, arguments: argparse.Namespace) -> int:
    """Loops that the model is meant for, or that `--exit` asks for where that is more."""
    return max(loaded.model.config.loops, parse_exit_policy(arguments.exit).max_loops or 0)


def make_engine(
    loaded: Loaded, arguments: argparse.Namespace, *, window: int, slots: int = 1, **changes: Any
) -> Engine:
    """An engine for requests of up to `window` tokens each. Says on stderr what the checkpoint warns of."""
    for warning in loaded.warnings:
        complain(str(warning))
    config = EngineConfig(
        slots=slots,
        capacity=window,
        loops=most_loops(loaded, arguments),
        cache=CacheStrategy(arguments.cache),
        chunk=min(_LONGEST_CHUNK, window),
        **changes,
    )
    return Engine(loaded.model, loaded.params, loaded.tokenizer, config=config)
