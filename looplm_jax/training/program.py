"""The mesh of a stage, its compiled programs, and batches on their way to the devices."""

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
from looplm_jax.data.packing import Batch
from looplm_jax.models.looplm import LoopLM
from looplm_jax.sharding import (
    batch_sharding,
    check_batch,
    check_divides,
    check_sequence,
    make_mesh,
    place_rows,
    use_mesh,
)
from looplm_jax.training.state import TrainState, abstract_state
from looplm_jax.training.step import DeviceBatch, StepMetrics, make_train_step


def stage_mesh(recipe: Recipe, stage: Stage, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a stage over `devices`, all attached ones by default.

    Raises:
      UserError: the model or the stage's batches do not divide over it.
    """
    mesh, where = make_mesh(recipe.mesh_of(stage), devices), f"stages.{stage.name}"
    check_divides(mesh, recipe.model)
    check_batch(mesh, stage.batch_size, stage.accumulation, where)
    check_sequence(mesh, stage.sequence_length, where)
    return mesh


class StagePrograms:
    """One compiled train step for each number of loops that a stage uses: one, unless loops are drawn at random."""

    def __init__(self, recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, *, first_step: int):
        self._recipe, self._model, self._stage, self._mesh = recipe, model, stage, mesh
        self._first_step = first_step
        self._programs: dict[int, Any] = {}

    def compiled(self, loops: int) -> bool:
        """Whether the program for this number of loops is ready."""
        return loops in self._programs

    def compile(self, loops: int) -> None:
        """Trace and compile. The state is donated: it is updated where it lies."""
        computed = _what_a_step_computes(self._recipe)
        self._programs[loops] = compiled_step(computed, self._model, self._stage, self._mesh, self._first_step, loops)

    def run(self, loops: int, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        """One step. `state` is used up."""
        return self._programs[loops](state, batch)

    def text(self, loops: int) -> str:
        """The compiled program, as text."""
        return self._programs[loops].as_text()


def _what_a_step_computes(recipe: Recipe) -> Recipe:
    """Returns the recipe with defaults where it says nothing about a train step: its seed, its data, what is saved, how
    many skipped steps in a row it bears.
    """
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
    """Returns the compiled train step of a stage.

    Kept: runs of one process that differ in their seeds or their data, as the cells of an experiment do, and a run that
    is resumed, have the same program.
    """
    return lower_step(recipe, model, stage, mesh, first_step=first_step, loops=loops).compile()


def lower_step(
    recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, *, first_step: int, loops: int
) -> jax.stages.Lowered:
    """The train step of a stage, traced for the devices of `mesh`, which need not be here. Its state is donated."""
    state = abstract_state(recipe, model, stage, mesh)
    step = make_train_step(recipe, model, stage, first_step=first_step, loops=loops)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, PartitionSpec())))
    with use_mesh(mesh):
        return jitted.lower(state, abstract_batch(stage, mesh))


def abstract_batch(stage: Stage, mesh: Mesh) -> DeviceBatch:
    """Shapes, types and shardings of a stage's batches."""
    shape = (stage.accumulation, stage.batch_size // stage.accumulation, stage.sequence_length)
    sharding = batch_sharding(mesh)
    integers: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    return DeviceBatch(tokens=integers, targets=integers, segment_ids=integers, positions=integers, loss_mask=mask)


def place(batch: Batch, stage: Stage, mesh: Mesh) -> DeviceBatch:
    """The rows of this process, put on its devices as its share of the global batch."""
    rows = stage.batch_size // stage.accumulation

    def put(own: np.ndarray) -> Array:
        return place_rows(own.reshape(stage.accumulation, -1, own.shape[-1]), mesh, rows)

    return DeviceBatch(**{field.name: put(getattr(batch, field.name)) for field in dataclasses.fields(batch)})


def draw_loops(stage: Stage, key: UInt32[np.ndarray, "2"], step: int) -> int:
    """The loops of one step: the stage's own number, or one drawn uniformly from `min_loops..loops`.

    It follows from `key` and `step` alone, the same on every process, and is drawn on the host: asking a device would
    wait for the step that is running.
    """
    if not stage.min_loops:
        return stage.loops
    generator = np.random.default_rng([*key, step])
    return int(generator.integers(stage.min_loops, stage.loops, endpoint=True))
