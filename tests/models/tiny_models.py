"""One tiny model for each option of the architecture, and its compiled forward pass."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from looplm_jax import testing
from looplm_jax.config import (
    ComputeConfig,
    GatePlacement,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)
from looplm_jax.models._looplm import LoopLM, Params

LENGTH = 6
DEFAULT_COMPUTE = ComputeConfig()
BASE = ModelConfig(vocab_size=29, width=16, mlp_width=24, num_layers=2, num_heads=4, loops=3, max_positions=32)
OPTIONS = {
    "ouro": {},
    "grouped_tied": {"num_kv_heads": 2, "tied_head": True},
    "pre_norm_one_kv_head": {"norm_placement": NormPlacement.PRE, "num_kv_heads": 1, "head_dim": 6},
    "prelude_add": {"prelude_layers": 1, "injection": Injection.ADD},
    "prelude_linear_coda": {"prelude_layers": 2, "injection": Injection.LINEAR, "coda_layers": 1, "num_kv_heads": 2},
    "coda_pre_norm_tied": {"coda_layers": 2, "norm_placement": NormPlacement.PRE, "tied_head": True},
    "huginn": {
        "prelude_layers": 1,
        "coda_layers": 1,
        "injection": Injection.LINEAR,
        "initial_state": InitialState.NOISE,
        "norm_placement": NormPlacement.OUTER,
        "state_norm": StateNorm.READOUT,
        "shared_readout_norm": True,
        "qk_bias": True,
        "embedding_scale": 4.0,
        "tied_head": True,
        "gate": GatePlacement.NONE,
    },
    "universal_transformer": {
        "norm_placement": NormPlacement.POST,
        "state_norm": StateNorm.READOUT,
        "time_signal": TimeSignal.LEARNED,
        "max_loops": 7,
        "position_signal": PositionSignal.SINUSOID,
        "gate": GatePlacement.BEFORE,
    },
    "parcae": {
        "injection": Injection.DIAGONAL,
        "injection_norm": True,
        "norm_placement": NormPlacement.PRE,
        "residual": Residual.PER_LOOP,
        "state_norm": StateNorm.READOUT,
        "time_signal": TimeSignal.SINUSOID,
    },
    "query": {
        "injection": Injection.QUERY,
        "injection_norm": True,
        "norm_placement": NormPlacement.PRE,
        "time_signal": TimeSignal.MODULATION,
    },
    "loopformer": {
        "norm_placement": NormPlacement.PRE,
        "state_norm": StateNorm.READOUT,
        "time_signal": TimeSignal.MODULATION,
    },
    "deep_loop": {"norm_placement": NormPlacement.OUTER, "residual": Residual.DEEP_LOOP, "prelude_layers": 1},
}

# The models of the default suite, which are compiled: no optional part or every part, with both norm placements.
IN_SHORT = ("ouro", "prelude_linear_coda", "coda_pre_norm_tied", "huginn", "universal_transformer", "query")


def tiny_config(option: str) -> ModelConfig:
    return dataclasses.replace(BASE, rope_theta=100.0, **OPTIONS[option])


@functools.cache
def tiny_model(option: str, compute: ComputeConfig = DEFAULT_COMPUTE) -> tuple[LoopLM, Params]:
    config = tiny_config(option)
    return testing.tiny_model(config, compute=compute)


@functools.cache
def compiled_forward(option: str) -> Callable:
    """Returns `forward(tokens, positions, segment_ids)` for [LENGTH, LENGTH] tokens: one compilation for many tests."""
    model, params = tiny_model(option)

    @jax.jit
    def forward(tokens, positions, segment_ids):
        return model.apply({"params": params}, tokens, positions=positions, segment_ids=segment_ids)

    return forward


def random_tokens(seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (LENGTH, LENGTH), 0, BASE.vocab_size)


def plain_positions() -> jax.Array:
    return jnp.broadcast_to(jnp.arange(LENGTH), (LENGTH, LENGTH))


def one_segment() -> jax.Array:
    return jnp.ones((LENGTH, LENGTH), jnp.int32)
