"""Initializes a new run from a checkpoint that its recipe names.

The parameters, the tokenizer and, if requested, the optimizer state are read directly into the shardings of the run.
A recipe may also take the model itself from the checkpoint, and add the tokens of the chat format to its tokenizer.
"""

import dataclasses
import math
import os
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from looplm_jax import codec
from looplm_jax.checkpoints import SkippedStep, read_metadata, restore_params
from looplm_jax.checkpoints._raw import read_array_info
from looplm_jax.config import ModelConfig, Recipe
from looplm_jax.convert._import_hf import is_hf_folder, load_hf, read_hf_config, read_hf_tokenizer
from looplm_jax.data.tokenizers import Tokenizer, deserialize, with_chat_tokens
from looplm_jax.errors import UserError
from looplm_jax.files import any_path
from looplm_jax.models._looplm import LoopLM, Params, boxed_shapes
from looplm_jax.sharding import abstract_arrays, check_divides, use_mesh
from looplm_jax.training._run_folder import RunFolder, saved_recipe
from looplm_jax.training._state import TrainState, abstract_state, state_around

# Do not change the shapes of parameters.
_NO_SHAPE = (
    *("loops", "rope_theta", "norm_eps", "max_positions", "embedding_scale", "residual", "state_norm"),
    *("initial_state", "state_std", "initializer", "init_std", "second_norm_init", "gate_bias"),
)
# The subtree of the train state in a checkpoint.
_OPTIMIZER = "optimizer"
_VOCABULARY_SHARDS = 128  # a vocabulary that these divide stays divisible when it grows


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
    start = _from_hf_folder(recipe, mesh) if is_hf_folder(path) else _from_checkpoint(recipe, model, mesh)
    return _with_chat_tokens(start, recipe, mesh) if recipe.start.chat_tokens else start


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
    trained = metadata.recipe()
    theirs = trained.model
    # The shape is compared before any array is read, because the message of the reader names arrays and not flags.
    ours = _as_stored(recipe, theirs)
    check_shape(path, ours, theirs)
    check_divides(mesh, ours)

    kind, own = trained.optimizer.kind, recipe.optimizer.kind
    if recipe.start.optimizer and kind is not own:
        raise UserError(
            f"{path} holds the optimizer state of {kind.value}, not of {own.value}; "
            f"type --optimizer.kind {kind.value}, or set start.optimizer to false"
        )

    wanted = abstract_state(recipe, LoopLM(ours, model.compute), recipe.stages[0], mesh)
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
    theirs = read_hf_config(Path(path))
    check_shape(path, _as_stored(recipe, theirs), theirs)
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


def _as_stored(recipe: Recipe, theirs: ModelConfig) -> ModelConfig:
    """Returns the model of the run with the vocabulary that it has in the checkpoint, before tokens are added."""
    grows = recipe.start.chat_tokens and theirs.vocab_size < recipe.model.vocab_size
    return dataclasses.replace(recipe.model, vocab_size=theirs.vocab_size) if grows else recipe.model


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


# The model of the checkpoint


def with_model_of_start(
    recipe: Recipe, out: str | os.PathLike[str] | None = None, given: Collection[str] = ()
) -> Recipe:
    """Returns the recipe with the model of the checkpoint that it starts from, if `start.model` asks for that.

    The vocabulary is large enough for the tokens that `start.chat_tokens` adds. A run that resumes takes the model from
    its own folder. In the result `start.model` is false, so it is unchanged if passed again.

    Args:
      recipe: the recipe.
      out: the run folder, if there is one.
      given: dotted paths of fields that stay as they are in the recipe.

    Raises:
      UserError: the recipe names no checkpoint, or it cannot be read.
    """
    if not recipe.start.model:
        return recipe
    if not recipe.start.checkpoint:
        raise UserError(
            f"recipe {recipe.name!r} starts from a trained model; say --start.checkpoint with a run folder, one of its "
            "steps, or a Hugging Face folder"
        )

    folder = None if out is None else RunFolder(path=any_path(out))
    saved = saved_recipe(folder) if folder is not None and folder.started else None
    model = _model_of_start(recipe) if saved is None else saved.model
    own = {path.removeprefix("model.") for path in given if path.startswith("model.")}
    model = dataclasses.replace(model, **{name: getattr(recipe.model, name) for name in own})

    # The loops of a stage are those that the model was trained for, unless they are given.
    loops = {} if saved is None else {stage.name: stage.loops for stage in saved.stages}
    stages = recipe.stages
    if not any(path.startswith("stage") and path.endswith(".loops") for path in given):
        stages = tuple(dataclasses.replace(stage, loops=loops.get(stage.name, model.loops)) for stage in recipe.stages)

    start = dataclasses.replace(recipe.start, model=False)
    return dataclasses.replace(recipe, model=model, stages=stages, start=start)


def _model_of_start(recipe: Recipe) -> ModelConfig:
    """Returns the model of the checkpoint, with room for tokens that are added."""
    path = recipe.start.checkpoint
    if is_hf_folder(Path(path)):
        model = read_hf_config(Path(path))
        tokenizer, _ = read_hf_tokenizer(Path(path), model.vocab_size)
    else:
        metadata = read_metadata(path)
        model, tokenizer = metadata.recipe().model, deserialize(metadata.tokenizer_kind, metadata.tokenizer)

    if not recipe.start.chat_tokens or tokenizer is None:
        return model
    needed = with_chat_tokens(tokenizer).vocab_size
    if needed <= model.vocab_size:
        return model
    multiple = math.gcd(model.vocab_size, _VOCABULARY_SHARDS)
    return dataclasses.replace(model, vocab_size=-(-needed // multiple) * multiple)


# Tokens that are added


def _with_chat_tokens(start: InitCheckpoint, recipe: Recipe, mesh: Mesh) -> InitCheckpoint:
    """Returns what a run starts from with the tokens of the chat format, and parameters for them."""
    # A folder without a tokenizer is refused later, with a message of its own.
    if start.tokenizer is None:
        return start

    tokenizer = with_chat_tokens(start.tokenizer)
    if tokenizer is start.tokenizer:
        return start

    added = tokenizer.vocab_size - start.tokenizer.vocab_size
    note = f"added {added} tokens of the chat format to the tokenizer of {start.origin}"
    vocab_size = max(start.model.vocab_size, recipe.model.vocab_size)
    return dataclasses.replace(
        start,
        model=dataclasses.replace(start.model, vocab_size=vocab_size),
        params=with_vocabulary(start.params, recipe.model, mesh),
        tokenizer=tokenizer,
        notes=(*start.notes, note),
    )


def with_vocabulary(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """Returns the parameters with the vocabulary of `config`, which is at least as large as theirs.

    New rows of the embedding, and new columns of the head, are the mean of the others: the model then predicts about as
    well as before (Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
    """
    more = config.vocab_size - params["embedding"].shape[0]
    if more == 0:
        return params

    def grown(values: Array, axis: int) -> Array:
        mean = jnp.mean(values, axis=axis, keepdims=True)
        return jnp.concatenate([values, jnp.repeat(mean, more, axis=axis)], axis=axis)

    def grow(params: Params) -> Params:
        axes = {"embedding": 0} if config.tied_head else {"embedding": 0, "head": 1}
        return {**params, **{name: grown(params[name], axis) for name, axis in axes.items()}}

    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_arrays(boxed_shapes(config), mesh))
    with use_mesh(mesh):
        return jax.jit(grow, out_shardings=placed)(params)
