"""What a run is made of at one step, and how it passes from one stage to the next."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from looplm_jax.config import Recipe, Stage
from looplm_jax.errors import UserError, suggest
from looplm_jax.models.looplm import LoopLM, Params, boxed_params, boxed_shapes
from looplm_jax.random_keys import seeded_key
from looplm_jax.sharding import abstract, use_mesh
from looplm_jax.training.guard import GuardState, initial_guard, next_stage_guard
from looplm_jax.training.optimizer import adamw


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; a checkpoint holds it whole.

    `step` counts steps over all stages, skipped ones included. `optimizer` belongs to the trainable parameters of
    the stage. `key` is the raw key that random choices of the training, such as a random number of loops, are drawn
    from.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState
    guard: GuardState
    key: UInt32[Array, "2"]


def split_params(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
    """The parameters that a stage trains and those it leaves alone, by top-level group; all are trained if none
    is named.
    """
    unknown = [group for group in trainable if group not in params]
    if unknown:
        raise UserError(f"no parameter group {unknown[0]!r} to train{suggest(unknown[0], params)}")
    groups = set(trainable) or set(params)
    moving = {name: value for name, value in params.items() if name in groups}
    return moving, {name: value for name, value in params.items() if name not in groups}


def boxed_state(recipe: Recipe, model: LoopLM, stage: Stage) -> TrainState:
    """The first state of a run as `stage` needs it, parameters boxed with their logical axis names."""
    params = boxed_params(model, jax.random.fold_in(seeded_key(recipe.seed), 0))
    return _around(params, recipe, stage)


def _around(params: Params, recipe: Recipe, stage: Stage) -> TrainState:
    """The rest of a first state. Boxed where the parameters are."""
    moving, _ = split_params(params, stage.trained_groups)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=adamw(recipe.optimizer).init(moving),
        guard=initial_guard(recipe.guard),
        key=jax.random.key_data(jax.random.fold_in(seeded_key(recipe.seed), 1)),
    )


def abstract_state(recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of the state that `stage` needs, without making it."""
    return abstract(jax.eval_shape(lambda params: _around(params, recipe, stage), boxed_shapes(model.config)), mesh)


def initial_state(recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh) -> TrainState:
    """The first state of a run, made where it will live. The same numbers on any mesh."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, model, stage, mesh))
    with use_mesh(mesh):
        return jax.jit(lambda: nn.meta.unbox(boxed_state(recipe, model, stage)), out_shardings=placed)()


def enter_stage(state: TrainState, recipe: Recipe, model: LoopLM, index: int, mesh: Mesh) -> TrainState:
    """The end of stage `index - 1` as the start of stage `index`, laid out on the mesh of that stage.

    The optimiser goes on where the same parameters are trained, and is fresh otherwise; the guard forgets the losses
    of another objective.
    """
    before, stage = recipe.stages[index - 1], recipe.stages[index]
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, model, stage, mesh))
    state = dataclasses.replace(state, guard=next_stage_guard(state.guard))
    if set(before.trained_groups) == set(stage.trained_groups):
        return jax.device_put(state, placed)
    rest = jax.device_put(dataclasses.replace(state, optimizer=()), dataclasses.replace(placed, optimizer=()))
    moving, _ = split_params(rest.params, stage.trained_groups)
    optimizer = jax.jit(adamw(recipe.optimizer).init, out_shardings=placed.optimizer)(moving)
    return dataclasses.replace(rest, optimizer=optimizer)
