"""Looped language models in JAX: shared layers applied T times, with a loss at every loop and a gate that stops early.

    >>> import jax.numpy as jnp
    >>> import looplm_jax
    >>> from looplm_jax.testing import tiny_config, tiny_model
    >>> model, params = tiny_model(tiny_config(loops=4))
    >>> out = model.apply({"params": params}, jnp.array([[1, 2, 3]]))
    >>> out.hidden.shape, out.gate_logits.shape  # [loops, batch, positions, width], [loops, batch, positions]
    ((4, 1, 3, 16), (4, 1, 3))
    >>> looplm_jax.halting.exit_distribution(out.gate_logits).shape  # the probability of stopping after each loop
    (4, 1, 3)

Load and generate: `load` reads a checkpoint or a Hugging Face folder into a `Loaded`, `generate` continues one prompt,
and an `Engine` with an `EngineConfig` serves many requests. Train: `train` runs a `Recipe` in a folder, and the same
call resumes it. Build a model in Python: `LoopLM`, `ModelConfig`, `ComputeConfig`, `init_params`. `UserError` is raised
for invalid input; its message is one line that says how to fix it.

The subpackages, each with examples in its own docstring:

* The method: `models`, `halting` (exit distributions, priors, exit policies) and `losses`, as functions of arrays.
* Runs: `data`, `training`, `rl`, `checkpoints`, `recipes`, `evaluation`, `planning`.
* Use: `inference`, `convert`, and `cli`, the command `looplm`.
* Devices and processes: `sharding`, `distributed`.
* `config` has every setting with its help text, and `testing` has small models and laws for tests.

Importing the package does not import JAX. Names are imported on first use.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Subpackages, and the modules that users import by path.
    from looplm_jax import (
        checkpoints,
        cli,
        config,
        convert,
        corpus,
        data,
        distributed,
        errors,
        evaluation,
        halting,
        inference,
        losses,
        models,
        planning,
        recipes,
        rl,
        sharding,
        testing,
        training,
    )

    # What a model is, how it is computed, and how it is trained.
    from looplm_jax.config import ComputeConfig, ModelConfig, Recipe

    # Invalid input.
    from looplm_jax.errors import UserError

    # Generation.
    from looplm_jax.inference._engine import Engine, generate
    from looplm_jax.inference._engine_config import EngineConfig

    # Models: from a path, or built in Python.
    from looplm_jax.loading import Loaded, load
    from looplm_jax.models._looplm import LoopLM, init_params

    # Training.
    from looplm_jax.training.run import train

__all__ = [
    "ComputeConfig",
    "Engine",
    "EngineConfig",
    "Loaded",
    "LoopLM",
    "ModelConfig",
    "Recipe",
    "UserError",
    "checkpoints",
    "cli",
    "config",
    "convert",
    "corpus",
    "data",
    "distributed",
    "errors",
    "evaluation",
    "generate",
    "halting",
    "inference",
    "init_params",
    "load",
    "losses",
    "models",
    "planning",
    "recipes",
    "rl",
    "sharding",
    "testing",
    "train",
    "training",
]
