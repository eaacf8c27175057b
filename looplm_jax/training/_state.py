"""The state of a run at one step, and the transition from one stage to the next."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt32

from looplm_jax.config import ModelConfig, Objective, Recipe, Stage
from looplm_jax.errors import UserError, suggest
from looplm_jax.models._looplm import LoopLM, Params, boxed_params, boxed_shapes
from looplm_jax.random_keys import from_raw, seeded_key
from looplm_jax.sharding import abstract_arrays, use_mesh
from looplm_jax.training._guard import GuardState, initial_guard, next_stage_guard
from looplm_jax.training._optimizer import axes_of, make_optimizer


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. A checkpoint contains all of it.

    Attributes:
      step: the number of steps over all stages, including skipped ones.
      params: the parameters, in top-level groups.
      optimizer: the optimizer state of the trainable parameters of the stage.
      guard: the state of the guard.
      key: the raw random key for random choices during training, such as a random number of loops.
      teacher: the average of earlier parameters in LoopRPT, or the parameters at the start of a stage that a policy
        gradient may not leave, in float32; or None. Only those that the stage trains, because the others are the same.
    """

    step: Int[Array, ""]
    params: Params
    optimizer: optax.OptState
    guard: GuardState
    key: UInt32[Array, "2"]
    teacher: Params | None = None


def split_params(params: Params, trainable: Sequence[str]) -> tuple[Params, Params]:
    """Returns the parameters that a stage trains, and the frozen ones.

    Args:
      params: the parameters by top-level group.
      trainable: the groups to train; empty for all.

    Raises:
      UserError: a group does not exist.
    """
    unknown = [group for group in trainable if group not in params]
    if unknown:
        raise UserError(f"no parameter group {unknown[0]!r} to train{suggest(unknown[0], params)}")

    # An empty selection trains all groups.
    groups = set(trainable) or set(params)
    moving = {name: value for name, value in params.items() if name in groups}
    return moving, {name: value for name, value in params.items() if name not in groups}


def _around(params: Params, recipe: Recipe, stage: Stage) -> TrainState:
    """Returns the first state of a run with these parameters, boxed with axis names if the parameters are."""
    # Frozen parameters have no optimizer state.
    moving, _ = split_params(params, stage.trained_groups)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=make_optimizer(recipe.optimizer, axes_of(recipe.model, moving)).init(moving),
        guard=initial_guard(recipe.guard),
        # Key 0 initializes the parameters (see `initial_state`); key 1 is for random choices during training.
        key=jax.random.key_data(jax.random.fold_in(seeded_key(recipe.seed), 1)),
        teacher=_first_teacher(moving) if _has_teacher(stage) else None,
    )


def _has_teacher(stage: Stage) -> bool:
    """Whether the state of a stage has a second copy of the parameters."""
    anchored = stage.objective is Objective.POLICY_GRADIENT and stage.policy.kl_weight > 0
    return anchored or stage.objective is Objective.LOOPRPT


def _first_teacher(moving: Params) -> Params:
    """Returns the teacher at the start of a stage: a copy of the parameters, because a step donates both."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), moving)


# The first state


def abstract_state(recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh) -> TrainState:
    """Returns shape, dtype and sharding of the state that `stage` needs, without allocating it."""
    return abstract_arrays(
        jax.eval_shape(lambda params: _around(params, recipe, stage), boxed_shapes(model.config)), mesh
    )


def initial_state(recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh) -> TrainState:
    """Returns the first state of a run, initialized directly in its sharding. Its values are the same on any mesh."""
    # Passed as raw data, so that the compiled initializer does not depend on the seed.
    key = jax.random.key_data(jax.random.fold_in(seeded_key(recipe.seed), 0))
    make = _initializer(model.config, mesh)
    with use_mesh(mesh):
        params = make(jax.device_get(key))
    return state_around(params, recipe, model, stage, mesh)


def state_around(
    params: Params, recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, optimizer: optax.OptState | None = None
) -> TrainState:
    """Returns the first state of a run with these parameters, and with this optimizer state if one is given."""
    given = {"params": params} if optimizer is None else {"params": params, "optimizer": optimizer}
    nothing: dict[str, Any] = dict.fromkeys(given)  # the given parts are not allocated a second time

    def rest(params: Params) -> TrainState:
        return dataclasses.replace(_around(params, recipe, stage), **nothing)

    placed = dataclasses.replace(abstract_state(recipe, model, stage, mesh), **nothing)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    with use_mesh(mesh):
        return dataclasses.replace(jax.jit(rest, out_shardings=shardings)(params), **given)


@functools.lru_cache(maxsize=8)
def _initializer(config: ModelConfig, mesh: Mesh) -> Callable[[UInt32[np.ndarray, "2"]], Params]:
    """Returns the program that initializes parameters from a raw key directly in their shardings, from a cache.

    Runs in one process that differ only in their seeds, such as the cells of an experiment, share a program.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_arrays(boxed_shapes(config), mesh))

    def make(raw: UInt32[Array, "2"]) -> Params:
        return nn.meta.unbox(boxed_params(LoopLM(config), from_raw(raw)))

    return jax.jit(make, out_shardings=placed)


# The next stage


def enter_stage(state: TrainState, recipe: Recipe, model: LoopLM, index: int, mesh: Mesh) -> TrainState:
    """Returns the final state of stage `index - 1` as the first state of stage `index`, in the shardings of its mesh.

    The optimizer state is kept if both stages train the same parameters, and reset otherwise. The guard clears its
    losses, because another objective has other losses. A teacher starts as the parameters.
    """
    before, stage = recipe.stages[index - 1], recipe.stages[index]
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, model, stage, mesh))
    same_parameters = set(before.trained_groups) == set(stage.trained_groups)

    # What starts again may have another tree structure, so it is left out of the transfer.
    empty: dict[str, Any] = {"teacher": None} if same_parameters else {"teacher": None, "optimizer": ()}
    kept = dataclasses.replace(state, guard=next_stage_guard(state.guard), **empty)
    state = jax.device_put(kept, dataclasses.replace(placed, **empty))

    moving, _ = split_params(state.params, stage.trained_groups)
    if not same_parameters:
        init = make_optimizer(recipe.optimizer, axes_of(recipe.model, moving)).init
        optimizer = jax.jit(init, out_shardings=placed.optimizer)(moving)
        state = dataclasses.replace(state, optimizer=optimizer)
    if placed.teacher is not None:
        teacher = jax.jit(_first_teacher, out_shardings=placed.teacher)(moving)
        state = dataclasses.replace(state, teacher=teacher)
    return state


def with_empty_guard(state: TrainState) -> TrainState:
    """Returns the state without the losses in the window of its guard, on the same devices."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, state.guard)
    return dataclasses.replace(state, guard=jax.device_put(next_stage_guard(state.guard), placed))
