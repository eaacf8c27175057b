"""The mesh of a stage, its compiled train steps, and the transfer of batches to the devices."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    Gradient,
    GuardConfig,
    Objective,
    ReadOut,
    Recipe,
    Stage,
    StartConfig,
)
from looplm_jax.data._packing import Batch, DepthBatch
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import (
    batch_sharding,
    check_batch,
    check_divides,
    check_sequence,
    make_mesh,
    place_rows,
    process_rows,
    use_mesh,
)
from looplm_jax.training._policy import RolloutBatch, abstract_rollouts
from looplm_jax.training._state import TrainState, abstract_state
from looplm_jax.training._step import StepMetrics, make_train_step

Columns = tuple[int, int] | None
"""The numbers of columns of prompts and of new tokens of rollouts, or None for other batches."""


# Programs


def stage_mesh(recipe: Recipe, stage: Stage, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a stage over `devices`, by default all devices.

    Raises:
      UserError: the model or the batches of the stage are not evenly divisible by the mesh.
    """
    mesh, where = make_mesh(recipe.mesh_of(stage), devices), f"stages.{stage.name}"

    check_divides(mesh, recipe.model)
    check_batch(mesh, stage.batch_size, stage.accumulation, where)
    check_sequence(mesh, stage.sequence_length, where)
    if mesh.shape["context"] > 1 and (stage.gradient is Gradient.IMPLICIT or stage.jacobian.weight):
        option = "gradient=implicit" if stage.gradient is Gradient.IMPLICIT else "jacobian.weight"
        raise UserError(
            f"{where}.{option} needs whole sequences on each device, and "
            f"{mesh.shape['context']} devices share one; set mesh.context=1"
        )
    return mesh


class StagePrograms:
    """The compiled train steps of a stage, one for each number of loops.

    There is only one if the number of loops is fixed, or if only the last loop is read out: then it is an input of the
    program. Rollouts have a program for each of few numbers of columns (`RolloutBatch.columns`).
    """

    def __init__(self, recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, *, first_step: int):
        self._recipe, self._model, self._stage, self._mesh = recipe, model, stage, mesh
        self._first_step = first_step
        self._programs: dict[tuple[int, Columns], Any] = {}

    def loops_of(self, depths: Int[np.ndarray, "B"]) -> int:
        """Returns the number of loops for which the program of a step with these depths is compiled.

        It is the largest of the stage if one program serves all.
        """
        return self._stage.deepest if self._stage.read_out is ReadOut.LAST else int(depths[0])

    def compiled(self, loops: int, columns: Columns = None) -> bool:
        """Whether the program for this number of loops, and of columns of rollouts, is compiled."""
        return (loops, columns) in self._programs

    def compile(self, loops: int, columns: Columns = None) -> None:
        """Traces and compiles the program for this number of loops, and of columns of rollouts."""
        computed = _what_a_step_computes(self._recipe)
        self._programs[loops, columns] = compiled_step(
            computed, self._model, self._stage, self._mesh, self._first_step, loops, columns
        )

    def run(
        self, loops: int, state: TrainState, batch: Batch[Array] | RolloutBatch, columns: Columns = None
    ) -> tuple[TrainState, StepMetrics]:
        """Runs one step. The buffers of `state` are donated."""
        return self._programs[loops, columns](state, batch)

    def text(self, loops: int) -> str:
        """Returns the compiled program as text."""
        return self._programs[loops, None].as_text()


def _what_a_step_computes(recipe: Recipe) -> Recipe:
    """Returns the recipe with defaults for the fields that do not influence a train step.

    These are the names, the seed, the data, the saves and evaluations, and `guard.patience`. Recipes that differ only
    in them share one compiled program.
    """
    # `patience` ends a run on the host; the step itself only counts.
    return dataclasses.replace(
        recipe,
        name="",
        description="",
        seed=0,
        data=DataConfig(),
        start=StartConfig(),
        guard=dataclasses.replace(recipe.guard, patience=GuardConfig().patience),
        checkpoint=CheckpointConfig(),
        evaluation=EvaluationConfig(),
    )


@functools.lru_cache(maxsize=8)
def compiled_step(
    recipe: Recipe,
    model: LoopLM,
    stage: Stage,
    mesh: Mesh,
    first_step: int,
    loops: int,
    columns: Columns = None,
) -> jax.stages.Compiled:
    """Returns the compiled train step of a stage, from a cache.

    Runs in one process whose recipes differ only in seed or data, such as the cells of an experiment, and resumed runs
    share a program.
    """
    lowered = lower_step(recipe, model, stage, mesh, first_step=first_step, loops=loops, columns=columns)
    return lowered.compile()


def lower_step(
    recipe: Recipe,
    model: LoopLM,
    stage: Stage,
    mesh: Mesh,
    *,
    first_step: int,
    loops: int,
    columns: Columns = None,
) -> jax.stages.Lowered:
    """Returns the train step of a stage, lowered for the devices of `mesh`. Its state is donated.

    This machine need not have those devices. Rollouts have the given numbers of columns, by default the largest ones.
    """
    # Shapes and shardings are enough to compile, so that programs for absent devices can be planned.
    state = abstract_state(recipe, model, stage, mesh)
    step = make_train_step(recipe, model, stage, first_step=first_step, loops=loops)
    # The new state must have the sharding of the old one, so that donation can reuse its buffers.
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
    with use_mesh(mesh):
        if stage.objective is Objective.POLICY_GRADIENT:
            return jitted.lower(state, _abstract_rollouts(stage, mesh, columns))
        return jitted.lower(state, abstract_batch(stage, mesh))


# Batches


def abstract_batch(stage: Stage, mesh: Mesh) -> Batch[Array]:
    """Returns shape, dtype and sharding of the batches of a stage."""
    # The first axis is scanned: one microbatch at a time.
    shape = (stage.accumulation, stage.batch_size // stage.accumulation, stage.sequence_length)
    sharding = batch_sharding(mesh)
    integers: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    plain = Batch(tokens=integers, targets=integers, segment_ids=integers, positions=integers, loss_mask=mask)
    return _with_depths(plain, integers) if stage.read_out is ReadOut.LAST else plain


def _abstract_rollouts(stage: Stage, mesh: Mesh, columns: Columns) -> RolloutBatch:
    """Returns shape, dtype and sharding of the rollouts of a stage."""

    def placed(leaf: jax.ShapeDtypeStruct) -> Any:
        # Rows are sharded, their columns are not.
        spec = PartitionSpec(*batch_sharding(mesh).spec[:2])
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(placed, abstract_rollouts(stage, columns))


def rollouts_to_device(batch: RolloutBatch, stage: Stage, mesh: Mesh) -> RolloutBatch:
    """Returns the rollouts of a step on the devices, `[R, ...]` as microbatches `[A, R / A, ...]`.

    Every process has all rollouts, and places those of its devices.
    """

    def put(own: np.ndarray, like: jax.ShapeDtypeStruct) -> Array:
        whole = np.asarray(own).reshape(like.shape)
        indices = like.sharding.addressable_devices_indices_map(like.shape)
        shards = jax.device_put([whole[index] for index in indices.values()], list(indices))
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)

    return jax.tree.map(put, batch, _abstract_rollouts(stage, mesh, batch.columns))


def to_device(
    batch: Batch[np.ndarray], stage: Stage, mesh: Mesh, depths: Int[np.ndarray, "B"] | None = None
) -> Batch[Array]:
    """Returns the global batch on the devices, of which `batch` has the sequences of this process.

    Args:
      batch: the sequences of this process.
      stage: the stage.
      mesh: the mesh.
      depths: the number of loops of every sequence of the global batch, for programs that read out the last loop only;
        by default the loops of the stage.
    """
    rows = stage.batch_size // stage.accumulation
    if stage.read_out is ReadOut.LAST:
        batch = _with_depths(batch, _own_depths(batch, stage, mesh, depths))

    def put(own: np.ndarray) -> Array:
        # [A * b, S] -> [A, b, S], where b is the number of sequences of this process in a microbatch.
        return place_rows(own.reshape(stage.accumulation, -1, own.shape[-1]), mesh, rows)

    return jax.tree.map(put, batch)


def _with_depths(batch: Batch[Any], depths: Any) -> DepthBatch[Any]:
    return DepthBatch(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}, depths=depths)


def _own_depths(
    batch: Batch[np.ndarray], stage: Stage, mesh: Mesh, depths: Int[np.ndarray, "B"] | None
) -> Int[np.ndarray, "b S"]:
    """Returns the number of loops at every position of the sequences of this process."""
    every = np.full(stage.batch_size, stage.deepest, np.int32) if depths is None else depths
    # Rows of microbatches, of which this process holds some.
    microbatches = every.reshape(stage.accumulation, -1)
    own = microbatches[:, list(process_rows(mesh, microbatches.shape[1]))].reshape(-1)
    return np.broadcast_to(own[:, None], batch.tokens.shape)
