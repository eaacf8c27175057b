"""The memory that a program needs on each device, and a lower bound of its time."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from looplm_jax.config import ModelConfig, Objective, Remat, Stage
from looplm_jax.planning._program_facts import Collective
from looplm_jax.planning._targets import Target
from looplm_jax.training._goodput import forward_flops_per_token, train_flops_per_token
from looplm_jax.training._state import TrainState

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")

_SECONDS_A_DAY = 86400


# Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. `other` is the batch, the guard, the program itself, and padding of arrays to tiles.

    `capacity` is None where nobody knows it. `host` is what lies in the memory of the host meanwhile.
    """

    parameters: int
    optimizer: int
    activations: int
    other: int
    host: int = 0
    capacity: int | None = None

    @property
    def total(self) -> int:
        """All that the device must hold at the worst moment."""
        return self.parameters + self.optimizer + self.activations + self.other


def state_memory(state: TrainState, capacity: int | None) -> Memory:
    """What the state alone takes, before anything is compiled."""
    parameters, optimizer = shard_bytes(state.params), shard_bytes(state.optimizer)
    other = shard_bytes(state) - parameters - optimizer
    return Memory(parameters=parameters, optimizer=optimizer, activations=0, other=other, capacity=capacity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramBytes:
    """Bytes that a compiled program takes on each device, by the compiler's account."""

    held: int  # arguments and results, those updated in place once
    temporaries: int  # at the worst moment
    code: int

    @classmethod
    def of(cls, analysis: Any) -> "ProgramBytes":
        """Returns the account in what `memory_analysis()` of a compiled program returns.

        Of temporaries the compiler gives two upper bounds, and the lower one counts. The size of all of them counts
        some of those inside a loop beside others that are never held at the same time. The peak exceeds even that in a
        program that keeps arrays in the memory of the host.
        """
        held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        temporaries = max(min(analysis.peak_memory_in_bytes - held, analysis.temp_size_in_bytes), 0)
        return cls(held=held, temporaries=temporaries, code=analysis.generated_code_size_in_bytes)


def compiled_memory(state: TrainState, analysis: Any, capacity: int | None) -> Memory:
    """Returns the compiler's account of a step, of which the state is a part."""
    alone, program = state_memory(state, capacity), ProgramBytes.of(analysis)
    other = program.held + program.code - alone.parameters - alone.optimizer
    host = analysis.host_temp_size_in_bytes
    return dataclasses.replace(alone, activations=program.temporaries, other=other, host=host)


def overfull_memory(state: TrainState, error: str) -> Memory | None:
    """The account in the compiler's refusal of a step that does not fit; None if the error is of another kind."""
    found = refusal(error)
    if found is None:
        return None
    alone = state_memory(state, found.limit)
    return dataclasses.replace(alone, activations=max(found.used - alone.total, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """Bytes that a program would use, its arguments included, and those that there are."""

    used: int
    limit: int


def refusal(error: str) -> Refusal | None:
    """Returns the account in the refusal of a program that does not fit; None for an error of another kind.

    What the compiler calls temporaries there contains the arguments.
    """
    found = _USED.search(error) or _TEMPORARIES.search(error)
    if found is None:
        return None
    used, limit = (int(float(found[at]) * _UNITS[found[at + 1].upper()]) for at in (1, 3))
    return Refusal(used=used, limit=limit)


def shard_bytes(tree: PyTree) -> int:
    """Bytes of one device's shares of abstract arrays."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def donated_arrays(text: str) -> int:
    """How many arguments the program updates where they lie."""
    header = text[: text.find("\n")]
    return len({int(number) for number in _ALIAS.findall(header)})


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


# Time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one step on every device at its published peaks.

    `compute` counts what rematerialization does again; `links` and `network` are all exchanges at the full bandwidth of
    every link. The exchanges of `waiting` are synchronous: nothing is computed meanwhile. A step cannot be faster than
    `compute` and `waiting` together, nor than `links` or `network`.
    """

    model_flops: float  # of one step, over all devices
    peak: float  # seconds for model_flops alone
    compute: float
    links: float
    network: float
    waiting: float
    tokens_per_second: float
    days: float  # for all steps of the stage
    model_flops_utilization: float  # at best

    @property
    def step(self) -> float:
        """The best possible time of a step."""
        return max(self.compute + self.waiting, self.links, self.network)


def step_flops(model: ModelConfig, stage: Stage) -> float:
    """Operations of one step by formula, over all devices; nothing is counted twice."""
    tokens = stage.batch_size * stage.sequence_length
    per_token = train_flops_per_token(
        model, loops=stage.loops, sequence_length=stage.sequence_length, objective=stage.objective
    )
    return float(per_token * tokens)


def recomputed_flops(model: ModelConfig, stage: Stage, remat: Remat) -> float:
    """Returns the operations of one step that the backward pass does again: a forward pass without its heads, and
    without what is saved.
    """
    if remat in (Remat.NONE, Remat.DOTS) or stage.objective is Objective.GATE:
        return 0.0
    forward = forward_flops_per_token(model, loops=stage.loops, sequence_length=stage.sequence_length)
    heads = stage.loops * 2 * model.width * model.vocab_size
    layers = model.prelude_layers + stage.loops * (model.num_layers + model.coda_layers)
    saved = layers * _saved_flops(model, stage.sequence_length, remat)
    return float((forward - heads - saved) * stage.batch_size * stage.sequence_length)


def _saved_flops(model: ModelConfig, sequence_length: int, remat: Remat) -> int:
    """Operations of a token in one layer whose results are saved for the backward pass."""
    inner, kv_inner = model.num_heads * model.head_width, model.kv_heads * model.head_width
    outputs = 2 * inner * (sequence_length + 1) + 2 * model.width * model.mlp_width
    match remat:
        case Remat.SAVE_OUTPUTS:
            return outputs
        case Remat.SAVE_QKV:
            return outputs + 2 * model.width * (inner + 2 * kv_inner)
    return 0


def estimate(
    model: ModelConfig, stage: Stage, remat: Remat, target: Target, exchanges: Sequence[Collective], devices: int
) -> Timing | None:
    """The times of a step on `devices` devices of a target; None where the chip's peaks are not known."""
    chip, bandwidth = target.chip, target.link_bandwidth
    if chip is None or bandwidth is None:
        return None
    flops = step_flops(model, stage)
    compute = (flops + recomputed_flops(model, stage, remat)) / devices / chip.peak_bf16_flops
    beyond = sum(each.bytes for each in exchanges if each.between_slices)
    inside = sum(each.bytes for each in exchanges if not each.between_slices)
    links = inside / bandwidth if inside else 0.0
    network = beyond / chip.network_bandwidth if beyond and chip.network_bandwidth else 0.0
    waiting = sum(each.bytes for each in exchanges if not each.asynchronous) / bandwidth
    step = max(compute + waiting, links, network)
    return Timing(
        model_flops=flops,
        peak=flops / devices / chip.peak_bf16_flops,
        compute=compute,
        links=links,
        network=network,
        waiting=waiting,
        tokens_per_second=stage.batch_size * stage.sequence_length / step,
        days=stage.steps * step / _SECONDS_A_DAY,
        model_flops_utilization=flops / devices / chip.peak_bf16_flops / step,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiming:
    """Seconds of one tick at the published bandwidths, and what follows from them when every slot is taken.

    A tick cannot be faster than its slowest part: what it reads and writes, or what devices send each other.
    """

    memory: float
    links: float
    floor: float  # seconds for the bytes of the floor alone
    ticks_per_second: float
    tokens_per_second: float  # every token takes all loops
    tokens_per_second_at_mean: float | None  # tokens take `loops_mean` loops on average

    @property
    def tick(self) -> float:
        """The best possible time of a tick."""
        return max(self.memory, self.links)


def decode_timing(
    target: Target, *, moved: int, floor: int, sent: int, slots: int, loops: int, loops_mean: float | None
) -> DecodeTiming | None:
    """The times of a tick that moves and sends so many bytes; None where the chip's bandwidths are not known."""
    chip, bandwidth = target.chip, target.link_bandwidth
    if chip is None or bandwidth is None:
        return None
    memory, links = moved / chip.hbm_bandwidth, sent / bandwidth if sent else 0.0
    ticks = 1 / max(memory, links)
    return DecodeTiming(
        memory=memory,
        links=links,
        floor=floor / chip.hbm_bandwidth,
        ticks_per_second=ticks,
        tokens_per_second=ticks * slots / loops,
        tokens_per_second_at_mean=ticks * slots / loops_mean if loops_mean else None,
    )
