"""Plans a stage: compiles it as `looplm train` would, and reads from the program what it needs and does."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looplm_jax.config import ComputeConfig, Gather, Objective, Recipe, Reduce, Remat, Stage
from looplm_jax.models._looplm import LoopLM, compute_dtype
from looplm_jax.planning._budget import (
    Memory,
    Timing,
    compiled_memory,
    donated_arrays,
    estimate,
    overfull_memory,
    shard_bytes,
)
from looplm_jax.planning._compiler import OutOfMemory, compile_program
from looplm_jax.planning._decode_plan import abstract_params, abstract_slots
from looplm_jax.planning._hlo import parse
from looplm_jax.planning._program_facts import Collective, Matmuls, attention_kernel, collectives, custom_calls, matmuls
from looplm_jax.planning._targets import Target
from looplm_jax.sharding import use_mesh
from looplm_jax.training._compile import lower_step, stage_mesh
from looplm_jax.training._local_params import local_mesh
from looplm_jax.training._policy import engine_config
from looplm_jax.training._state import TrainState, abstract_state

_LARGE_STATE = 0.5  # fraction of the memory above which the state should be sharded over more devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFacts:
    """Facts about a compiled program.

    Attributes:
      collectives: the exchanges between devices.
      matmuls: the matrix products.
      attention: the kernel of attention.
      kernels: the kernels that XLA did not generate.
      donated: the number of arrays that are updated in place.
      state_arrays: the number of arrays of the state.
    """

    collectives: tuple[Collective, ...]
    matmuls: Matmuls
    attention: str
    kernels: tuple[str, ...]
    donated: int
    state_arrays: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The plan of a stage on a target.

    Attributes:
      stage: the name of the stage.
      target: the name of the target.
      devices: the number of devices.
      mesh: the sizes of the axes of the mesh.
      fits: whether the step fits in the memory of a device.
      memory: the memory of a device.
      inside: facts about the program, or None if it does not fit.
      timing: a lower bound of the time of a step, or None if it does not fit or the chip is unknown.
      advice: flags that would make the stage fit or faster.
      compile_seconds: how long the compilation took.
    """

    stage: str
    target: str
    devices: int
    mesh: dict[str, int]
    fits: bool
    memory: Memory
    inside: ProgramFacts | None
    timing: Timing | None
    advice: tuple[str, ...]
    compile_seconds: float


def plan_stage(recipe: Recipe, stage: Stage, target: Target) -> StagePlan:
    """Returns the plan of a stage, from its train step compiled for a target.

    Args:
      recipe: the recipe of the stage.
      stage: the stage.
      target: the devices.

    Raises:
      UserError: the model or the batches are not evenly divisible by the devices.
    """
    mesh = stage_mesh(recipe, stage, target.devices)
    compute = recipe.compute_of(stage)
    model = LoopLM(recipe.model_of(stage), compute)
    state = abstract_state(recipe, model, stage, mesh)

    started = time.perf_counter()
    program, memory = _compile(recipe, model, stage, mesh, state, target)
    memory = dataclasses.replace(memory, engine=engine_bytes(model, stage, mesh))
    seconds = time.perf_counter() - started

    inside = None if program is None else _program_facts(program.as_text() or "", model, mesh, state)

    timing = None
    if inside is not None:
        timing = estimate(model.config, stage, compute.remat, target, inside.collectives, devices=mesh.devices.size)
    fits = program is not None and (memory.capacity is None or memory.total <= memory.capacity)

    return StagePlan(
        stage=stage.name,
        target=target.name,
        devices=mesh.devices.size,
        mesh=dict(mesh.shape),
        fits=fits,
        memory=memory,
        inside=inside,
        timing=timing,
        advice=advice(recipe, stage, mesh, memory, inside.collectives if inside else (), fits=fits),
        compile_seconds=seconds,
    )


def _compile(
    recipe: Recipe, model: LoopLM, stage: Stage, mesh: Mesh, state: TrainState, target: Target
) -> tuple[jax.stages.Compiled | None, Memory]:
    """Returns the program and its memory, or None and the memory that it would need if it does not fit."""
    first = sum(earlier.steps for earlier in recipe.stages[: recipe.stages.index(stage)])

    program = compile_program(
        lambda: lower_step(recipe, model, stage, mesh, first_step=first, loops=stage.deepest),
        f"stage {stage.name} for {target.name}",
        _to_compile(model.compute),
    )
    if isinstance(program, OutOfMemory):
        return None, overfull_memory(state, program)
    return program, compiled_memory(state, program, target.capacity)


def engine_bytes(model: LoopLM, stage: Stage, mesh: Mesh) -> int:
    """Returns the bytes on each device of the engine that generates the answers of a stage; 0 if it generates none.

    The engine exists during the update too. Every process has one on its own devices.
    """
    if stage.objective is not Objective.POLICY_GRADIENT:
        return 0

    own = local_mesh(mesh)
    prompts = math.ceil(stage.batch_size * own.size / mesh.size)
    network = LoopLM(dataclasses.replace(model.config, loops=stage.loops), model.compute)
    with use_mesh(mesh):
        dtype = jnp.dtype(compute_dtype(model.compute))
    held = shard_bytes(abstract_slots(network, engine_config(stage, prompts), dtype, own).cache.planes)
    if own is not mesh or dtype != jnp.float32:
        held += shard_bytes(abstract_params(model.config, dtype, own))
    return held


def _program_facts(text: str, model: LoopLM, mesh: Mesh, state: TrainState) -> ProgramFacts:
    """Returns the facts about a program that is given as text."""
    program = parse(text)
    with use_mesh(mesh):
        expected = "bf16" if compute_dtype(model.compute) == jnp.bfloat16 else "f32"
    slices = len({getattr(device, "slice_index", None) for device in mesh.devices.flat})
    return ProgramFacts(
        collectives=collectives(program, mesh.devices.size, slices),
        matmuls=matmuls(program, expected),
        attention=attention_kernel(program),
        kernels=custom_calls(program),
        donated=donated_arrays(text),
        state_arrays=len(jax.tree.leaves(state)),
    )


# Advice


def advice(
    recipe: Recipe, stage: Stage, mesh: Mesh, memory: Memory, exchanges: Sequence[Collective], *, fits: bool
) -> tuple[str, ...]:
    """Returns flags that would make a stage fit or send less, the cheapest change first, with reasons."""
    return tuple(_to_send_less(mesh, exchanges) if fits else _to_fit(recipe, stage, mesh, memory))


def _to_fit(recipe: Recipe, stage: Stage, mesh: Mesh, memory: Memory) -> Iterator[str]:
    """Yields changes that reduce memory."""
    compute, shards = recipe.compute_of(stage), mesh.shape["data"] * mesh.shape["fsdp"]
    if compute.reduce is Reduce.STEP:
        yield "hold gradients in the type of the matrix products: --compute.reduce microbatch"
    elif compute.reduce is Reduce.MICROBATCH:
        yield "hold the shards of gradients alone: --compute.reduce loop"
    elif compute.gather is Gather.PER_STEP:
        yield "gather the weights of each layer when it runs: --compute.gather per_layer"

    if compute.remat in (Remat.NONE, Remat.DOTS, Remat.SAVE_QKV, Remat.SAVE_OUTPUTS):
        yield "recompute the layers in the backward pass: --compute.remat layer"

    microbatches = next_accumulation(stage, shards)
    if microbatches is not None:
        yield f"split the batch into more microbatches: --stages.{stage.name}.accumulation {microbatches}"

    state = memory.parameters + memory.optimizer
    if mesh.shape["data"] > 1 and memory.capacity and state > _LARGE_STATE * memory.capacity:
        yield "shard the parameters over all devices: --mesh.data 1 --mesh.fsdp -1"

    # Changes that cost more communication, if there can be no more microbatches.
    if microbatches is None and compute.remat is Remat.LAYER:
        yield "offload the inputs of layers to the memory of the host: --compute.remat offload"
    if microbatches is None:
        more = 2 * mesh.shape["context"]
        yield f"let {more} devices share each sequence: --stages.{stage.name}.context {more}"


def _to_compile(compute: ComputeConfig) -> str:
    """Returns the change to suggest if the compiler fails on a stage."""
    if compute.remat is Remat.OFFLOAD:
        return "keep the inputs of layers on the device: --compute.remat layer"
    return "change the settings of compute or mesh, or try others with --search"


def _to_send_less(mesh: Mesh, exchanges: Sequence[Collective]) -> Iterator[str]:
    """Yields changes that reduce communication between slices."""
    gathered = any(each.between_slices and each.in_loop_over_t and each.kind == "all-gather" for each in exchanges)
    if gathered and mesh.shape["data"] == 1:
        yield "every loop sends weights from slice to slice; keep them within one: --mesh.data SLICES --mesh.fsdp -1"


def next_accumulation(stage: Stage, shards: int) -> int | None:
    """Returns the next larger number of microbatches that can each be split into `shards`, or None."""
    larger = range(stage.accumulation + 1, stage.batch_size // shards + 1)
    return next((count for count in larger if stage.batch_size % (count * shards) == 0), None)
