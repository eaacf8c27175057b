"""One stage, compiled as `looplm train` would compile it, and what that program says of itself."""

import dataclasses
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looplm_jax.config import Recipe, Stage
from looplm_jax.models.looplm import LoopLM, compute_dtype
from looplm_jax.planning.advice import advice
from looplm_jax.planning.collectives import Collective, collectives
from looplm_jax.planning.hlo import parse
from looplm_jax.planning.kernels import Matmuls, attention_kernel, custom_calls, matmuls
from looplm_jax.planning.memory import Memory, compiled_memory, donated_arrays, overfull_memory
from looplm_jax.planning.targets import Target, without_network
from looplm_jax.planning.timing import Timing, estimate
from looplm_jax.sharding import use_mesh
from looplm_jax.training.program import lower_step, stage_mesh
from looplm_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inside:
    """What a program that fits is made of. `donated` of the `state_arrays` are updated where they lie."""

    collectives: tuple[Collective, ...]
    matmuls: Matmuls
    attention: str
    kernels: tuple[str, ...]
    donated: int
    state_arrays: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage on a target. `inside` and `timing` are None where it does not fit, `timing` also for unknown chips."""

    stage: str
    target: str
    devices: int
    mesh: dict[str, int]
    fits: bool
    memory: Memory
    inside: Inside | None
    timing: Timing | None
    advice: tuple[str, ...]
    compile_seconds: float


def plan_stage(recipe: Recipe, stage: Stage, target: Target) -> StagePlan:
    """Compile the train step of a stage for a target, and read from the program what it needs and does.

    Raises:
      UserError: the model or the batches do not divide over the target's devices.
    """
    mesh = stage_mesh(recipe, stage, target.devices)
    compute = recipe.compute_of(stage)
    model = LoopLM(recipe.model_of(stage), compute)
    state = abstract_state(recipe, model, stage, mesh)
    started = time.perf_counter()
    program, memory = _compile(recipe, model, stage, mesh, state, target)
    seconds = time.perf_counter() - started
    inside = None if program is None else _look_inside(program.as_text() or "", model, mesh, state)
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
    """The program and its memory, or no program and the memory that it would have needed."""
    first = sum(earlier.steps for earlier in recipe.stages[: recipe.stages.index(stage)])
    capacity = target.capacity
    with without_network():
        lowered = lower_step(recipe, model, stage, mesh, first_step=first, loops=stage.loops)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            memory = overfull_memory(state, str(error))
            if memory is None:
                raise
            return None, memory
    return program, compiled_memory(state, program.memory_analysis(), capacity)


def _look_inside(text: str, model: LoopLM, mesh: Mesh, state: TrainState) -> Inside:
    program = parse(text)
    with use_mesh(mesh):
        meant = "bf16" if compute_dtype(model.compute) == jnp.bfloat16 else "f32"
    slices = len({getattr(device, "slice_index", None) for device in mesh.devices.flat})
    return Inside(
        collectives=collectives(program, mesh.devices.size, slices),
        matmuls=matmuls(program, meant),
        attention=attention_kernel(program),
        kernels=custom_calls(program),
        donated=donated_arrays(text),
        state_arrays=len(jax.tree.leaves(state)),
    )
