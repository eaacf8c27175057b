"""Plans a stage: compiles it as `looplm train` would, and reads from the program what it needs and does."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from looplm_jax.config import Gather, Recipe, Reduce, Remat, Stage
from looplm_jax.models.looplm import LoopLM, compute_dtype
from looplm_jax.planning._budget import Memory, Timing, compiled_memory, donated_arrays, estimate, overfull_memory
from looplm_jax.planning._hlo import parse
from looplm_jax.planning._program_facts import Collective, Matmuls, attention_kernel, collectives, custom_calls, matmuls
from looplm_jax.planning._targets import Target, without_network
from looplm_jax.sharding import use_mesh
from looplm_jax.training._compile import lower_step, stage_mesh
from looplm_jax.training._state import TrainState, abstract_state

_MUCH = 0.5  # of the memory: what takes more should be spread over more devices


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFacts:
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
    inside: ProgramFacts | None
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


def _program_facts(text: str, model: LoopLM, mesh: Mesh, state: TrainState) -> ProgramFacts:
    program = parse(text)
    with use_mesh(mesh):
        meant = "bf16" if compute_dtype(model.compute) == jnp.bfloat16 else "f32"
    slices = len({getattr(device, "slice_index", None) for device in mesh.devices.flat})
    return ProgramFacts(
        collectives=collectives(program, mesh.devices.size, slices),
        matmuls=matmuls(program, meant),
        attention=attention_kernel(program),
        kernels=custom_calls(program),
        donated=donated_arrays(text),
        state_arrays=len(jax.tree.leaves(state)),
    )


# Advice


def advice(
    recipe: Recipe, stage: Stage, mesh: Mesh, memory: Memory, exchanges: Sequence[Collective], *, fits: bool
) -> tuple[str, ...]:
    """Flags to type, the cheapest change first; empty where nothing need change."""
    return tuple(_to_send_less(mesh, exchanges) if fits else _to_fit(recipe, stage, mesh, memory))


def _to_fit(recipe: Recipe, stage: Stage, mesh: Mesh, memory: Memory) -> Iterator[str]:
    compute, shares = recipe.compute_of(stage), mesh.shape["data"] * mesh.shape["fsdp"]
    if compute.reduce is Reduce.STEP:
        yield "hold gradients in the type of the matrix products: --compute.reduce microbatch"
    elif compute.reduce is Reduce.MICROBATCH:
        yield "hold the shards of gradients alone: --compute.reduce loop"
    elif compute.gather is Gather.PER_STEP:
        yield "gather the weights of each layer when it runs: --compute.gather per_layer"
    if compute.remat in (Remat.NONE, Remat.DOTS, Remat.SAVE_QKV, Remat.SAVE_OUTPUTS):
        yield "compute the layers again in the backward pass: --compute.remat layer"
    parts = next_accumulation(stage, shares)
    if parts is not None:
        yield f"cut the batch into more parts: --stages.{stage.name}.accumulation {parts}"
    state = memory.parameters + memory.optimizer
    if mesh.shape["data"] > 1 and memory.capacity and state > _MUCH * memory.capacity:
        yield "spread the parameters over all devices: --mesh.data 1 --mesh.fsdp -1"
    if parts is None and compute.remat is Remat.LAYER:
        yield "keep what layers start from in the memory of the host: --compute.remat offload"
    if parts is None:
        more = 2 * mesh.shape["context"]
        yield f"let {more} devices share each sequence: --stages.{stage.name}.context {more}"


def _to_send_less(mesh: Mesh, exchanges: Sequence[Collective]) -> Iterator[str]:
    gathered = any(each.between_slices and each.in_loop_over_t and each.kind == "all-gather" for each in exchanges)
    if gathered and mesh.shape["data"] == 1:
        yield "every loop sends weights from slice to slice; keep them within one: --mesh.data SLICES --mesh.fsdp -1"


def next_accumulation(stage: Stage, shares: int) -> int | None:
    """The next number of parts that divides the batch into parts that `shares` devices can share; None: no more."""
    bigger = range(stage.accumulation + 1, stage.batch_size // shares + 1)
    return next((parts for parts in bigger if stage.batch_size % (parts * shares) == 0), None)
