"""The mesh of a stage, its compiled train steps, and the transfer of batches to the devices."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from looplm_jax.config import CheckpointConfig, DataConfig, EvaluationConfig, GuardConfig, Recipe, Stage, StartConfig
from looplm_jax.data._packing import Batch
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import (
    batch_sharding,
    check_batch,
    check_divides,
    check_sequence,
    make_mesh,
    place_rows,
    use_mesh,
)
from looplm_jax.training._state import TrainState, abstract_state
from looplm_jax.training._step import StepMetrics, make_train_step

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
    return mesh


class StagePrograms:
    """The compiled train steps of a stage, one for each number of loops.

    There is only one unless the number of loops is drawn at random.
    """

    def __init__(self, recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, *, first_step: int):
        self._recipe, self._model, self._stage, self._mesh = recipe, model, stage, mesh
        self._first_step = first_step
        self._programs: dict[int, Any] = {}

    def compiled(self, loops: int) -> bool:
        """Whether the program for this number of loops is compiled."""
        return loops in self._programs

    def compile(self, loops: int) -> None:
        """Traces and compiles the program for this number of loops."""
        computed = _what_a_step_computes(self._recipe)
        self._programs[loops] = compiled_step(computed, self._model, self._stage, self._mesh, self._first_step, loops)

    def run(self, loops: int, state: TrainState, batch: Batch[Array]) -> tuple[TrainState, StepMetrics]:
        """Runs one step. The buffers of `state` are donated."""
        return self._programs[loops](state, batch)

    def text(self, loops: int) -> str:
        """Returns the compiled program as text."""
        return self._programs[loops].as_text()


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
    recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, first_step: int, loops: int
) -> jax.stages.Compiled:
    """Returns the compiled train step of a stage, from a cache.

    Runs in one process whose recipes differ only in seed or data, such as the cells of an experiment, and resumed runs
    share a program.
    """
    return lower_step(recipe, model, stage, mesh, first_step=first_step, loops=loops).compile()


def lower_step(
    recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, *, first_step: int, loops: int
) -> jax.stages.Lowered:
    """Returns the train step of a stage, lowered for the devices of `mesh`. Its state is donated.

    This machine need not have those devices.
    """
    # Shapes and shardings are enough to compile, so that programs for absent devices can be planned.
    state = abstract_state(recipe, model, stage, mesh)
    step = make_train_step(recipe, model, stage, first_step=first_step, loops=loops)
    # The new state must have the sharding of the old one, so that donation can reuse its buffers.
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
    with use_mesh(mesh):
        return jitted.lower(state, abstract_batch(stage, mesh))


# Batches


def abstract_batch(stage: Stage, mesh: Mesh) -> Batch[Array]:
    """Returns shape, dtype and sharding of the batches of a stage."""
    # The first axis is scanned: one microbatch at a time.
    shape = (stage.accumulation, stage.batch_size // stage.accumulation, stage.sequence_length)
    sharding = batch_sharding(mesh)
    integers: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return Batch(tokens=integers, targets=integers, segment_ids=integers, positions=integers, loss_mask=mask)


def to_device(batch: Batch[np.ndarray], stage: Stage, mesh: Mesh) -> Batch[Array]:
    """Returns the global batch on the devices, of which `batch` has the sequences of this process."""
    rows = stage.batch_size // stage.accumulation

    def put(own: np.ndarray) -> Array:
        # [A * b, S] -> [A, b, S], where b is the number of sequences of this process in a microbatch.
        return place_rows(own.reshape(stage.accumulation, -1, own.shape[-1]), mesh, rows)

    return jax.tree.map(put, batch)


def draw_loops(stage: Stage, key: UInt32[np.ndarray, "2"], step: int) -> int:
    """Returns the number of loops of one step: that of the stage, or one drawn uniformly from `min_loops..loops`.

    It depends only on `key` and `step`, so it is the same on every process. It is drawn on the host, because fetching
    it from a device would wait for the running step.

    Args:
      stage: the stage.
      key: the raw random key of the run.
      step: the number of the step.
    """
    if not stage.min_loops:
        return stage.loops

    # A generator for each step needs no saved state: a resumed run draws the same numbers.
    generator = np.random.default_rng([*key, step])
    return int(generator.integers(stage.min_loops, stage.loops, endpoint=True))
