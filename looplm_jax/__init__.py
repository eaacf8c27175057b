"""Looped language models in JAX: shared layers applied T times, with a loss at every loop and a gate that stops early.

Load a model and generate: `load`, `generate`, and `Engine` with `EngineConfig` for many requests. Train: `train` with a
`Recipe`. Build a model in Python: `LoopLM`, `ModelConfig`, `ComputeConfig` and `init_params`. `UserError` is the error
for invalid input.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from looplm_jax.config import ComputeConfig, ModelConfig, Recipe
    from looplm_jax.errors import UserError
    from looplm_jax.inference.engine import Engine
    from looplm_jax.inference.engine_config import EngineConfig
    from looplm_jax.inference.generate import generate
    from looplm_jax.loading import Loaded, load
    from looplm_jax.models.looplm import LoopLM, init_params
    from looplm_jax.training.run import train

_HOMES = {
    "ComputeConfig": "config",
    "Engine": "inference.engine",
    "EngineConfig": "inference.engine_config",
    "Loaded": "loading",
    "LoopLM": "models.looplm",
    "ModelConfig": "config",
    "Recipe": "config",
    "UserError": "errors",
    "generate": "inference.generate",
    "init_params": "models.looplm",
    "load": "loading",
    "train": "training.run",
}

__all__ = [
    "ComputeConfig",
    "Engine",
    "EngineConfig",
    "Loaded",
    "LoopLM",
    "ModelConfig",
    "Recipe",
    "UserError",
    "generate",
    "init_params",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first access, so that `looplm --help` does not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
