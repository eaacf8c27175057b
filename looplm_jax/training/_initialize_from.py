"""Initializes a new run from a checkpoint that its recipe names.

The parameters, the tokenizer and, if requested, the optimizer state are read directly into the shardings of the run.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from looplm_jax import codec
from looplm_jax.checkpoints import SkippedStep, read_metadata, restore_params
from looplm_jax.checkpoints._raw import read_array_info
from looplm_jax.config import ModelConfig, Recipe
from looplm_jax.convert._import_hf import is_hf_folder, load_hf, read_hf_config
from looplm_jax.data.tokenizers import Tokenizer, deserialize
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM, Params
from looplm_jax.training._state import TrainState, abstract_state, state_around

_NO_SHAPE = ("loops", "rope_theta", "norm_eps", "max_positions", "init_std")  # do not change the shapes of parameters
# The subtree of the train state in a checkpoint.
_OPTIMIZER = "optimizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitCheckpoint:
    """The contents of a checkpoint from which a run starts.

    Attributes:
      origin: the checkpoint, for messages.
      model: the model configuration of the checkpoint.
      params: the parameters in float32, in the shardings of the run.
      optimizer: the optimizer state, or None for a fresh one.
      tokenizer: the tokenizer, or None for a Hugging Face folder without one.
      skipped: the newer steps that were skipped.
      notes: ambiguities and contradictions of a Hugging Face folder.
    """

    origin: str
    model: ModelConfig
    params: Params
    optimizer: optax.OptState | None
    tokenizer: Tokenizer | None
    skipped: tuple[SkippedStep, ...] = ()
    notes: tuple[str, ...] = ()


def read_init_checkpoint(recipe: Recipe, model: LoopLM, mesh: Mesh) -> InitCheckpoint:
    """Reads `recipe.start.checkpoint`, array by array, into the shardings of the run.

    Raises:
      UserError: there is no valid checkpoint, its model has another shape, or it has no optimizer state that the first
        stage can use.
    """
    path = Path(recipe.start.checkpoint)
    if is_hf_folder(path):
        return _from_hf_folder(recipe, mesh)
    return _from_checkpoint(recipe, model, mesh)


def initialized_state(start: InitCheckpoint, recipe: Recipe, model: LoopLM, mesh: Mesh) -> TrainState:
    """Returns the first state of a run, like `training.state.initial_state`, with the arrays of `start`."""
    return state_around(start.params, recipe, model, recipe.stages[0], mesh, start.optimizer)


def describe_init_checkpoint(start: InitCheckpoint, ours: ModelConfig) -> str:
    """Returns a line about what the run starts from.

    It includes the settings of the model that differ without changing its shape.
    """
    what = "the parameters" if start.optimizer is None else "the parameters and the optimizer state"
    differing = codec.differences(_filled_in(ours), _filled_in(start.model))
    settings = (
        f"; settings of the model that differ (here, there): {'; '.join(map(str, differing))}" if differing else ""
    )
    return f"starting from {what} of {start.origin}{settings}"


def check_shape(origin: str, ours: ModelConfig, theirs: ModelConfig) -> None:
    """Raises UserError if the parameters of one model do not fit the other. The message has the flags that fix it."""
    # Fields that do not change the shapes take our values, so that only the others are compared.
    free = {name: getattr(ours, name) for name in _NO_SHAPE}
    here, there = _filled_in(ours), dataclasses.replace(_filled_in(theirs), **free)

    differing = codec.differences(here, there)
    if differing:
        values = codec.to_dict(there)
        names = [difference.path for difference in differing]
        flags = " ".join(f"--model.{name} {str(values[name]).lower()}" for name in names)
        listed = "; ".join(map(str, differing))
        raise UserError(f"{origin} holds a model of another shape ({listed} there); type {flags}, or start elsewhere")


# Reading


def _from_checkpoint(recipe: Recipe, model: LoopLM, mesh: Mesh) -> InitCheckpoint:
    """Reads a checkpoint of this package."""
    path = recipe.start.checkpoint
    metadata = read_metadata(path)
    theirs = metadata.recipe().model
    # The shape is compared before any array is read, because the message of the reader names arrays and not flags.
    check_shape(path, recipe.model, theirs)

    wanted = abstract_state(recipe, model, recipe.stages[0], mesh)
    restored = restore_params(path, wanted.params, dtype=jnp.float32)
    optimizer = _read_optimizer(recipe, wanted.optimizer, restored.step) if recipe.start.optimizer else None

    return InitCheckpoint(
        origin=f"{path}, step {restored.step}",
        model=theirs,
        params=restored.state,
        optimizer=optimizer,
        tokenizer=deserialize(metadata.tokenizer_kind, metadata.tokenizer),
        skipped=restored.skipped,
    )


def _from_hf_folder(recipe: Recipe, mesh: Mesh) -> InitCheckpoint:
    """Reads a Hugging Face folder."""
    path = recipe.start.checkpoint
    check_shape(path, recipe.model, read_hf_config(Path(path)))
    if recipe.start.optimizer:
        raise _without_optimizer(path)

    # Parameters are trained in float32, whatever the dtype of the files.
    found = load_hf(path, mesh=mesh, dtype=jnp.float32)

    return InitCheckpoint(
        origin=path,
        model=found.config,
        params=found.params,
        optimizer=None,
        tokenizer=found.tokenizer,
        notes=found.notes,
    )


def _filled_in(model: ModelConfig) -> ModelConfig:
    """Returns the same model with the defaults that depend on other fields filled in."""
    return dataclasses.replace(model, num_kv_heads=model.kv_heads, head_dim=model.head_width)


def _read_optimizer(recipe: Recipe, wanted: optax.OptState, step: int) -> optax.OptState:
    """Reads the optimizer state. Raises UserError if the first stage cannot use it."""
    path, stage = recipe.start.checkpoint, recipe.stages[0].name
    if not any(name.startswith(f"{_OPTIMIZER}.") for name in read_array_info(path, step=step)):
        raise _without_optimizer(path)
    try:
        return restore_params(path, wanted, step=step, prefix=_OPTIMIZER).state
    except UserError as error:
        raise UserError(
            f"stage {stage!r} cannot take over the optimizer state: {error}; set start.optimizer to false, or name a "
            "step of a stage that trains the same parameters"
        ) from None


def _without_optimizer(path: str) -> UserError:
    """Returns the error for a checkpoint without optimizer state."""
    return UserError(f"{path} holds no optimizer state; set start.optimizer to false")
