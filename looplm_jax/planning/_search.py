"""Searches the settings of a stage for those that no others beat in both time and memory."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from looplm_jax.config import (
    ComputeConfig,
    Gather,
    MeshConfig,
    ModelConfig,
    Recipe,
    Reduce,
    Remat,
    Stage,
    TopologySettings,
)
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM
from looplm_jax.planning._budget import recomputed_flops, shard_bytes
from looplm_jax.planning._compiler import DoesNotCompile
from looplm_jax.planning._stage_plan import StagePlan
from looplm_jax.planning._targets import Target
from looplm_jax.sharding import topology_name
from looplm_jax.training._compile import stage_mesh
from looplm_jax.training._state import abstract_state

_REMATS = (Remat.DOTS, Remat.SAVE_QKV, Remat.SAVE_OUTPUTS, Remat.LAYER, Remat.OFFLOAD, Remat.LOOP)
_EXCHANGES = (
    (Gather.PER_LAYER, Reduce.AUTO),
    (Gather.PER_STEP, Reduce.LOOP),
    (Gather.PER_STEP, Reduce.MICROBATCH),
    (Gather.PER_STEP, Reduce.STEP),
)
_GRADIENT_BYTES = {Reduce.AUTO: 0, Reduce.LOOP: 0, Reduce.MICROBATCH: 2, Reduce.STEP: 4}  # per element, unsharded
_BYTES = 2  # per element in bfloat16
_AXIS_SIZES = (1, 2, 4, 8)  # of data, tensor and context
_MAX_SEQUENCES = 8  # per device and microbatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of a stage to try.

    Attributes:
      recipe: the recipe with these settings.
      stage: the stage with these settings.
      settings: the settings alone.
      flags: the settings as flags.
      weight: the order of the candidates; the smallest is the most promising.
    """

    recipe: Recipe
    stage: Stage
    settings: TopologySettings
    flags: str
    weight: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and its compiled plan."""

    candidate: Candidate
    plan: StagePlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """A candidate that the compiler failed on, and its error."""

    candidate: Candidate
    error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The result of a search.

    Attributes:
      trials: the compiled candidates, fastest first.
      best: those that fit and that no other beats in both time and memory.
      failures: the candidates that the compiler failed on.
      cannot_fit: the number of candidates that cannot fit, by arithmetic.
      skipped: the number of candidates that were not compiled because of the limit.
    """

    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    failures: tuple[Failure, ...] = ()
    cannot_fit: int
    skipped: int


Compile = Callable[[Candidate, int, int], StagePlan]


def search(recipe: Recipe, stage: Stage, target: Target, compile_plan: Compile, *, limit: int) -> SearchResult:
    """Compiles the most promising settings of a stage that can fit. Those that the compiler fails on are skipped.

    Args:
      recipe: the recipe.
      stage: the stage.
      target: the devices.
      compile_plan: returns the plan of a candidate, given its number among those that are compiled, and their count.
      limit: the largest number of candidates to compile.

    Raises:
      UserError: no settings are evenly divisible by the devices, or none can fit.
    """
    if limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")

    # Candidates that cannot fit are excluded without compiling. The size of the state depends on the mesh alone.
    everything = list(candidates(recipe, stage, target))
    states = {each.settings.mesh: each for each in everything}
    sizes = {mesh: _state_bytes(each, target) for mesh, each in states.items()}
    possible = [each for each in everything if can_fit(each, target, sizes[each.settings.mesh])]
    if not possible:
        raise UserError(f"no setting of stage {stage.name} fits {target.name}, by arithmetic alone; use more devices")

    chosen = sorted(possible, key=lambda each: each.weight)[:limit]
    trials: list[Trial] = []
    failures: list[Failure] = []
    for number, each in enumerate(chosen, 1):
        try:
            trials.append(Trial(candidate=each, plan=compile_plan(each, number, len(chosen))))
        except DoesNotCompile as error:
            failures.append(Failure(candidate=each, error=str(error)))
    # Those that fit, then the fastest, then the smallest.
    trials.sort(key=lambda trial: (not trial.plan.fits, _time(trial), trial.plan.memory.total))

    return SearchResult(
        trials=tuple(trials),
        best=pareto(trials),
        failures=tuple(failures),
        cannot_fit=len(everything) - len(possible),
        skipped=len(possible) - len(chosen),
    )


def candidates(recipe: Recipe, stage: Stage, target: Target) -> Iterator[Candidate]:
    """Yields every combination of mesh, accumulation, rematerialization, gathering and reduction that is divisible."""
    topology = topology_name(target.devices)

    for mesh, remat, (gather, reduce) in itertools.product(_meshes(len(target.devices)), _REMATS, _EXCHANGES):
        compute = dataclasses.replace(recipe.compute, remat=remat, gather=gather, reduce=reduce)

        for microbatches in _accumulations(stage, mesh.data * mesh.fsdp):
            settings = TopologySettings(topology=topology, accumulation=microbatches, mesh=mesh, compute=compute)
            changed = dataclasses.replace(stage, accumulation=microbatches, settings=(settings,))
            stages = tuple(changed if each is stage else each for each in recipe.stages)
            tried = dataclasses.replace(recipe, stages=stages, topology=topology)

            # Raises for heads, widths or sequences that the axes do not divide.
            try:
                stage_mesh(tried, changed, target.devices)
            except UserError:
                continue
            if gather is Gather.PER_STEP and mesh.fsdp * mesh.context == 1:
                continue  # no parameters are sharded

            weight = _weight(recipe.model_of(stage), changed, settings)
            yield Candidate(
                recipe=tried, stage=changed, settings=settings, flags=_flags(stage, settings), weight=weight
            )


def can_fit(candidate: Candidate, target: Target, state_bytes: int) -> bool:
    """Whether the state, all-gathered weights, their gradients and saved activations fit in the memory of a device.

    Args:
      candidate: the settings.
      target: the devices.
      state_bytes: the bytes of the state on a device.
    """
    if target.capacity is None:
        return True

    stage, mesh, compute = candidate.stage, candidate.settings.mesh, candidate.settings.compute
    needed = state_bytes

    if compute.gather is Gather.PER_STEP:
        # The gathered copy in bfloat16, and the gradient if it is not sharded either.
        copies = _BYTES + _GRADIENT_BYTES[compute.reduce]
        needed += copies * stack_parameters(candidate.recipe.model) // mesh.tensor

    # Only what certainly exists at the same time is counted, so that nothing that fits is excluded.
    token_shards = mesh.data * mesh.fsdp * mesh.context
    tokens = stage.batch_size * stage.sequence_length // stage.accumulation // token_shards
    saved_loops = stage.backward_loops or stage.deepest
    if stage.shortcut.any:
        saved_loops += stage.loops - 1
    return needed + tokens * _BYTES * saved_loops * _saved_elements(candidate) <= target.capacity


def pareto(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Returns the trials that fit and that no other beats in both time and memory."""
    fitting = [trial for trial in trials if trial.plan.fits]
    return tuple(trial for trial in fitting if not any(_beats(other, trial) for other in fitting))


def fastest_settings(result: SearchResult) -> TopologySettings:
    """Returns the fastest settings that fit. Raises ValueError if none do."""
    return min(result.best, key=_time).candidate.settings


def stack_parameters(model: ModelConfig) -> int:
    """Returns the number of parameters in the matrices that all loops use."""
    inner, kv_inner = model.num_heads * model.head_width, model.kv_heads * model.head_width
    layer = model.width * (2 * inner + 2 * kv_inner + 3 * model.mlp_width)
    return (model.num_layers + model.coda_layers) * layer


def _saved_elements(candidate: Candidate) -> int:
    """Returns the least number of elements of a token that each loop saves for the backward pass on the device."""
    model = candidate.recipe.model
    inner, kv_inner = model.num_heads * model.head_width, model.kv_heads * model.head_width
    inputs, outputs, heads = model.width, model.width + inner, inner + 2 * kv_inner

    match candidate.settings.compute.remat:
        case Remat.LAYER:
            return model.num_layers * inputs
        case Remat.SAVE_OUTPUTS:
            return model.num_layers * (inputs + outputs)
        case Remat.SAVE_QKV:
            return model.num_layers * (inputs + outputs + heads)
        case Remat.DOTS:
            return model.num_layers * (inputs + outputs + heads + model.width + 2 * model.mlp_width)

    return inputs


def _state_bytes(candidate: Candidate, target: Target) -> int:
    """Returns the bytes of the train state on one device."""
    recipe, stage = candidate.recipe, candidate.stage
    model = LoopLM(recipe.model_of(stage), candidate.settings.compute)
    return shard_bytes(abstract_state(recipe, model, stage, stage_mesh(recipe, stage, target.devices)))


def _beats(one: Trial, other: Trial) -> bool:
    """Whether one trial is at least as good as the other in both time and memory, and better in one."""
    ours, theirs = ((_time(each), each.plan.memory.total) for each in (one, other))
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _time(trial: Trial) -> float:
    return trial.plan.timing.step if trial.plan.timing else 0.0


def _meshes(devices: int) -> Iterator[MeshConfig]:
    """Yields the meshes of a number of devices."""
    # All devices that remain shard the parameters.
    for copies, tensor, context in itertools.product(_AXIS_SIZES, _AXIS_SIZES, _AXIS_SIZES):
        others = copies * tensor * context
        if devices % others == 0:
            yield MeshConfig(data=copies, fsdp=devices // others, tensor=tensor, context=context)


def _accumulations(stage: Stage, shards: int) -> Iterator[int]:
    """Yields the numbers of microbatches that can be split into `shards`, with a few sequences on each device."""
    for microbatches in range(1, stage.batch_size // shards + 1):
        is_divisible = stage.batch_size % (microbatches * shards) == 0
        if is_divisible and stage.batch_size // microbatches <= _MAX_SEQUENCES * shards:
            yield microbatches


def _weight(model: ModelConfig, stage: Stage, settings: TopologySettings) -> tuple[float, ...]:
    """Returns the order of a candidate. The smallest is the most promising.

    It has the recomputed FLOPs, the devices that share heads or sequences, how often weights and gradients are sent,
    the microbatches, and the copies of the parameters.
    """
    mesh, compute = settings.mesh, settings.compute
    recomputed = recomputed_flops(model, stage, compute.remat)
    return recomputed, mesh.tensor * mesh.context, _times_sent(compute, stage), stage.accumulation, mesh.data


def _times_sent(compute: ComputeConfig, stage: Stage) -> int:
    """Returns how often a step all-gathers the weights and sums the gradients."""
    passes = stage.deepest * stage.accumulation

    match compute.reduce:
        case Reduce.STEP:
            return 2
        case Reduce.MICROBATCH:
            return 1 + stage.accumulation

    # Gradients are summed in every pass. Weights are gathered once, or in every forward and backward pass.
    return passes + (1 if compute.gather is Gather.PER_STEP else 2 * passes)


def _flags(stage: Stage, settings: TopologySettings) -> str:
    """Returns the settings as flags of `looplm plan` and `looplm train`."""
    mesh, where = settings.mesh, f"--stages.{stage.name}"
    # With `context` set for the stage, its devices are taken from fsdp.
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp * mesh.context, "tensor": mesh.tensor}
    axes = " ".join(f"--mesh.{name} {size}" for name, size in sizes.items() if size > 1 or name != "tensor")
    if mesh.context > 1 or stage.context:
        axes += f" {where}.context {mesh.context}"

    names = ("remat", "gather", "reduce")
    compute = " ".join(f"--compute.{name} {getattr(settings.compute, name).value}" for name in names)
    return f"{where}.accumulation {settings.accumulation} {compute} {axes}"
