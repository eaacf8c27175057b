"""Which settings of a stage are worth having: no other is both faster and smaller."""

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
from looplm_jax.models.looplm import LoopLM
from looplm_jax.planning._budget import recomputed_flops, shard_bytes
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
_GRADIENT_BYTES = {Reduce.AUTO: 0, Reduce.LOOP: 0, Reduce.MICROBATCH: 2, Reduce.STEP: 4}  # of an element, unsharded
_BYTES = 2  # of an element in bfloat16
_SHARES = (1, 2, 4, 8)  # devices along tensor, context, and copies of the parameters
_MOST_SEQUENCES = 8  # of a device at one time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of a stage to try: in the recipe, alone, and as flags. The smallest `weight` is the most promising."""

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
class SearchResult:
    """All that was compiled, fastest first; those that nothing beats; and how many were not compiled, and why."""

    trials: tuple[Trial, ...]
    best: tuple[Trial, ...]
    cannot_fit: int
    skipped: int


Compile = Callable[[Candidate, int, int], StagePlan]


def search(recipe: Recipe, stage: Stage, target: Target, compile_plan: Compile, *, limit: int) -> SearchResult:
    """Compile the `limit` most promising settings of a stage that can fit, by `compile_plan(candidate, number, count)`.

    Raises:
      UserError: no setting divides over the devices, or none can fit.
    """
    if limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    everything = list(candidates(recipe, stage, target))
    states = {each.settings.mesh: each for each in everything}  # one of each mesh, on which alone the state depends
    sizes = {mesh: _state_bytes(each, target) for mesh, each in states.items()}
    possible = [each for each in everything if can_fit(each, target, sizes[each.settings.mesh])]
    if not possible:
        raise UserError(f"no setting of stage {stage.name} fits {target.name}, by arithmetic alone; use more devices")
    chosen = sorted(possible, key=lambda each: each.weight)[:limit]
    trials = [
        Trial(candidate=each, plan=compile_plan(each, number, len(chosen))) for number, each in enumerate(chosen, 1)
    ]
    trials.sort(key=lambda trial: (not trial.plan.fits, _time(trial), trial.plan.memory.total))
    return SearchResult(
        trials=tuple(trials),
        best=pareto(trials),
        cannot_fit=len(everything) - len(possible),
        skipped=len(possible) - len(chosen),
    )


def candidates(recipe: Recipe, stage: Stage, target: Target) -> Iterator[Candidate]:
    """Every combination of mesh, accumulation, remat policy, gathering and reduction that divides over the devices."""
    topology = topology_name(target.devices)
    for mesh, remat, (gather, reduce) in itertools.product(_meshes(len(target.devices)), _REMATS, _EXCHANGES):
        compute = dataclasses.replace(recipe.compute, remat=remat, gather=gather, reduce=reduce)
        shares = mesh.data * mesh.fsdp
        for parts in _accumulations(stage, shares):
            settings = TopologySettings(topology=topology, accumulation=parts, mesh=mesh, compute=compute)
            changed = dataclasses.replace(stage, accumulation=parts, settings=(settings,))
            stages = tuple(changed if each is stage else each for each in recipe.stages)
            tried = dataclasses.replace(recipe, stages=stages, topology=topology)
            try:
                stage_mesh(tried, changed, target.devices)
            except UserError:
                continue
            if gather is Gather.PER_STEP and mesh.fsdp * mesh.context == 1:
                continue  # nothing is spread
            weight = _weight(recipe.model_of(stage), changed, settings)
            yield Candidate(
                recipe=tried, stage=changed, settings=settings, flags=_flags(stage, settings), weight=weight
            )


def can_fit(candidate: Candidate, target: Target, state_bytes: int) -> bool:
    """Whether the state, whole copies of the weights, their gradients and what the backward pass starts from leave any
    room.
    """
    if target.capacity is None:
        return True
    stage, mesh, compute = candidate.stage, candidate.settings.mesh, candidate.settings.compute
    needed = state_bytes
    if compute.gather is Gather.PER_STEP:
        copies = _BYTES + _GRADIENT_BYTES[compute.reduce]
        needed += copies * stack_parameters(candidate.recipe.model) // mesh.tensor
    sharing = mesh.data * mesh.fsdp * mesh.context
    tokens = stage.batch_size * stage.sequence_length // stage.accumulation // sharing
    return needed + tokens * _BYTES * stage.loops * _kept_widths(candidate) <= target.capacity


def pareto(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Those that fit and that no other beats in both time and memory."""
    fitting = [trial for trial in trials if trial.plan.fits]
    return tuple(trial for trial in fitting if not any(_beats(other, trial) for other in fitting))


def fastest_settings(result: SearchResult) -> TopologySettings:
    """Returns the fastest settings that fit. Raises ValueError if none do."""
    return min(result.best, key=_time).candidate.settings


def stack_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices that all loops use."""
    inner, kv_inner = model.num_heads * model.head_width, model.kv_heads * model.head_width
    layer = model.width * (2 * inner + 2 * kv_inner + 3 * model.mlp_width)
    return (model.num_layers + model.coda_layers) * layer


def _kept_widths(candidate: Candidate) -> int:
    """Elements that a token keeps on the device for the backward pass in each loop, at least."""
    model = candidate.recipe.model
    inner, kv_inner = model.num_heads * model.head_width, model.kv_heads * model.head_width
    starts, outputs, heads = model.width, model.width + inner, inner + 2 * kv_inner
    match candidate.settings.compute.remat:
        case Remat.LAYER:
            return model.num_layers * starts
        case Remat.SAVE_OUTPUTS:
            return model.num_layers * (starts + outputs)
        case Remat.SAVE_QKV:
            return model.num_layers * (starts + outputs + heads)
        case Remat.DOTS:
            return model.num_layers * (starts + outputs + heads + model.width + 2 * model.mlp_width)
    return starts


def _state_bytes(candidate: Candidate, target: Target) -> int:
    recipe, stage = candidate.recipe, candidate.stage
    model = LoopLM(recipe.model_of(stage), candidate.settings.compute)
    return shard_bytes(abstract_state(recipe, model, stage, stage_mesh(recipe, stage, target.devices)))


def _beats(one: Trial, other: Trial) -> bool:
    ours, theirs = ((_time(each), each.plan.memory.total) for each in (one, other))
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _time(trial: Trial) -> float:
    return trial.plan.timing.step if trial.plan.timing else 0.0


def _meshes(devices: int) -> Iterator[MeshConfig]:
    for copies, tensor, context in itertools.product(_SHARES, _SHARES, _SHARES):
        others = copies * tensor * context
        if devices % others == 0:
            yield MeshConfig(data=copies, fsdp=devices // others, tensor=tensor, context=context)


def _accumulations(stage: Stage, shares: int) -> Iterator[int]:
    """Every number of parts that `shares` devices can share, with a few sequences to each device."""
    for parts in range(1, stage.batch_size // shares + 1):
        if stage.batch_size % (parts * shares) == 0 and stage.batch_size // parts <= _MOST_SEQUENCES * shares:
            yield parts


def _weight(model: ModelConfig, stage: Stage, settings: TopologySettings) -> tuple[float, ...]:
    """Returns what is recomputed; devices that share heads or sequences; how often weights and gradients are sent;
    microbatches; copies.
    """
    mesh, compute = settings.mesh, settings.compute
    again = recomputed_flops(model, stage, compute.remat)
    return again, mesh.tensor * mesh.context, _times_sent(compute, stage), stage.accumulation, mesh.data


def _times_sent(compute: ComputeConfig, stage: Stage) -> int:
    """How often a step gathers all weights and sums all gradients."""
    passes = stage.loops * stage.accumulation
    match compute.reduce:
        case Reduce.STEP:
            return 2
        case Reduce.MICROBATCH:
            return 1 + stage.accumulation
    return passes + (1 if compute.gather is Gather.PER_STEP else 2 * passes)


def _flags(stage: Stage, settings: TopologySettings) -> str:
    """Returns the settings as flags of `looplm plan` and `looplm train`, which then divide the devices alike."""
    mesh, where = settings.mesh, f"--stages.{stage.name}"
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp * mesh.context, "tensor": mesh.tensor}
    axes = " ".join(f"--mesh.{name} {size}" for name, size in sizes.items() if size > 1 or name != "tensor")
    if mesh.context > 1 or stage.context:
        axes += f" {where}.context {mesh.context}"
    names = ("remat", "gather", "reduce")
    compute = " ".join(f"--compute.{name} {getattr(settings.compute, name).value}" for name in names)
    return f"{where}.accumulation {settings.accumulation} {compute} {axes}"
