"""The memory that a program needs on each device, and a lower bound of its time."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from looplm_jax.config import Credit, ModelConfig, Objective, ReadOut, Remat, Stage
from looplm_jax.planning._compiler import OutOfMemory
from looplm_jax.planning._program_facts import Collective
from looplm_jax.planning._targets import Target
from looplm_jax.training._goodput import forward_flops_per_token, train_flops_per_token
from looplm_jax.training._state import TrainState

_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")

_SECONDS_A_DAY = 86400


# Memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory of one device during a step, in bytes.

    Attributes:
      parameters: the parameters, and those of the teacher in reinforcement learning.
      optimizer: the optimizer state.
      activations: temporaries of the program at their peak.
      other: the batch, the guard, the program itself, and padding of arrays to tiles.
      engine: the engine that generates the answers of a policy gradient: its cache, and its copy of the parameters.
      host: arrays that are offloaded to the memory of the host.
      capacity: the memory of the device, or None if it is not known.
    """

    parameters: int
    optimizer: int
    activations: int
    other: int
    engine: int = 0
    host: int = 0
    capacity: int | None = None

    @property
    def total(self) -> int:
        """The peak memory of the device."""
        return self.parameters + self.optimizer + self.activations + self.other + self.engine


def state_memory(state: TrainState, capacity: int | None) -> Memory:
    """Returns the memory of the state alone, before anything is compiled."""
    parameters, optimizer = shard_bytes((state.params, state.teacher)), shard_bytes(state.optimizer)
    # The guard and the counters of steps.
    other = shard_bytes(state) - parameters - optimizer
    return Memory(parameters=parameters, optimizer=optimizer, activations=0, other=other, capacity=capacity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramBytes:
    """The memory of a compiled program on each device, in bytes, as the compiler reports it."""

    held: int  # arguments and results; arrays that are updated in place count once
    temporaries: int  # at their peak
    code: int

    @classmethod
    def of(cls, program: jax.stages.Compiled) -> "ProgramBytes":
        """Returns the memory of a compiled program.

        The compiler gives two upper bounds of the temporaries, and the lower one is used. The sum of their sizes counts
        some in loops that do not exist at the same time. The peak exceeds even that in programs that offload arrays to
        the host. On a CPU, the peak leaves temporaries out, so their sum is used.
        """
        analysis: Any = program.memory_analysis()
        held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        temporaries = analysis.temp_size_in_bytes
        if _platform(program) != "cpu":
            temporaries = max(min(analysis.peak_memory_in_bytes - held, temporaries), 0)
        return cls(held=held, temporaries=temporaries, code=analysis.generated_code_size_in_bytes)


def _platform(program: jax.stages.Compiled) -> str:
    """Returns the platform of a program's devices."""
    shardings = jax.tree.leaves(program.input_shardings)
    return next(iter(shardings[0].device_set)).platform


def compiled_memory(state: TrainState, program: jax.stages.Compiled, capacity: int | None) -> Memory:
    """Returns the memory of a compiled step."""
    alone, taken = state_memory(state, capacity), ProgramBytes.of(program)
    other = taken.held + taken.code - alone.parameters - alone.optimizer
    analysis: Any = program.memory_analysis()
    return dataclasses.replace(alone, activations=taken.temporaries, other=other, host=analysis.host_temp_size_in_bytes)


def overfull_memory(state: TrainState, refused: OutOfMemory) -> Memory:
    """Returns the memory that a step would need which does not fit."""
    alone = state_memory(state, refused.limit)
    return dataclasses.replace(alone, activations=max(refused.used - alone.total, 0))


def shard_bytes(tree: PyTree) -> int:
    """Returns the bytes of one device's shards of abstract arrays."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def donated_arrays(text: str) -> int:
    """Returns how many arguments a program updates in place."""
    header = text[: text.find("\n")]
    return len({int(number) for number in _ALIAS.findall(header)})


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


# Time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """A lower bound of the time of a step, with all devices and links at their published peaks.

    A step cannot be faster than `compute` and `waiting` together, nor than `links` or `network`.

    Attributes:
      model_flops: the model FLOPs of one step, over all devices.
      peak: the seconds for the model FLOPs alone.
      compute: the seconds for the model FLOPs and those of recomputation.
      links: the seconds of all exchanges within slices.
      network: the seconds of all exchanges between slices.
      waiting: the seconds of synchronous exchanges, during which nothing is computed.
      tokens_per_second: the highest possible rate.
      days: the days for all steps of the stage.
      model_flops_utilization: the highest possible model FLOPs utilization.
    """

    model_flops: float
    peak: float
    compute: float
    links: float
    network: float
    waiting: float
    tokens_per_second: float
    days: float
    model_flops_utilization: float

    @property
    def step(self) -> float:
        """The best possible time of a step."""
        return max(self.compute + self.waiting, self.links, self.network)


def step_flops(model: ModelConfig, stage: Stage) -> float:
    """Returns the model FLOPs of one step over all devices, by formula and without recomputation.

    Those of a policy gradient are of the update alone, without the generation of its answers.
    """
    per_token = train_flops_per_token(
        model,
        loops=stage.mean_loops,
        sequence_length=stage.sequence_length,
        objective=stage.objective,
        read_out=stage.read_out,
        backprop_loops=stage.backward_loops,
        short_loops=stage.mean_short_loops,
        rollouts=stage.looprpt.rollouts,
    )
    if stage.objective is not Objective.POLICY_GRADIENT:
        return float(per_token * step_tokens(stage))

    # The replay, forward and backward in every update, and forward alone by the parameters that the loss compares with.
    policy, forward = stage.policy, per_token / 3
    of_rollout = policy.updates > 1 and policy.credit is not Credit.TRAJECTORY
    passes = 3 * policy.updates + of_rollout + (policy.kl_weight > 0)
    return float(passes * forward * step_tokens(stage))


def step_tokens(stage: Stage) -> int:
    """Returns the positions of the sequences of a step. Those of a policy gradient are the longest answers."""
    answers = stage.policy.answers if stage.objective is Objective.POLICY_GRADIENT else 1
    return stage.batch_size * answers * stage.sequence_length


def recomputed_flops(model: ModelConfig, stage: Stage, remat: Remat) -> float:
    """Returns the FLOPs of one step that the backward pass recomputes.

    These are a forward pass without its heads and without the results that are saved. LoopRPT recomputes it for every
    rollout too, and before that the whole rollout.
    """
    # A gate alone has no backward pass through the layers.
    if stage.objective is Objective.GATE:
        return 0.0

    # Loops without gradients are not recomputed.
    loops = min(stage.backward_loops or stage.mean_loops, stage.mean_loops)
    forward, heads, within = _recomputed_of_pass(model, stage, remat, loops)

    per_token: float = within
    if stage.shortcut.any:
        per_token += _recomputed_of_pass(model, stage, remat, stage.mean_short_loops)[2]
    if stage.objective is Objective.LOOPRPT:
        # The pass without noise and all rollouts recompute logits: the weights of their losses depend on them.
        per_token = (1 + stage.looprpt.rollouts) * (within + heads) + stage.looprpt.rollouts * (forward - heads)
    if stage.objective is Objective.POLICY_GRADIENT:
        # The loss of the replay recomputes logits.
        per_token = stage.policy.updates * (within + heads)
    return float(per_token * step_tokens(stage))


def _recomputed_of_pass(model: ModelConfig, stage: Stage, remat: Remat, loops: float) -> tuple[float, float, float]:
    """Returns the FLOPs of a token in a forward pass, those of its heads, and those that its backward pass recomputes.

    The last do not count the heads.
    """
    read_out = ReadOut.LAST if stage.objective is Objective.PONDER else stage.read_out
    readouts = 1 if read_out is ReadOut.LAST else loops
    forward = forward_flops_per_token(model, loops=loops, sequence_length=stage.sequence_length, read_out=read_out)
    # One head per read-out, whose logits the loss never stores: it computes their gradients in the forward pass.
    heads = readouts * 2 * model.width * model.vocab_size
    layers = model.prelude_layers + loops * model.num_layers + readouts * model.coda_layers

    # Nothing, because these save the results of all products, or what is not saved.
    within: float = 0
    if remat not in (Remat.NONE, Remat.DOTS):
        within = forward - heads - layers * _saved_flops(model, stage.sequence_length, remat)
    return forward, heads, within


def _saved_flops(model: ModelConfig, sequence_length: int, remat: Remat) -> int:
    """Returns the FLOPs of a token in one layer whose results are saved for the backward pass."""
    inner, kv_inner = model.num_heads * model.head_width, model.kv_heads * model.head_width
    # Attention, whose causal products over S positions cost half of 4 * inner * S, and the last product of the MLP.
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
    """Returns a lower bound of the time of a step, or None if the peaks of the chip are not known.

    Args:
      model: the model.
      stage: the stage.
      remat: what the backward pass recomputes.
      target: the devices.
      exchanges: the collectives of a step.
      devices: the number of devices.
    """
    chip, bandwidth = target.chip, target.link_bandwidth
    if chip is None or bandwidth is None:
        return None

    flops = step_flops(model, stage)
    # Model FLOPs utilization does not count recomputation, but the time of a step does.
    compute = (flops + recomputed_flops(model, stage, remat)) / devices / chip.peak_bf16_flops

    # Exchanges between slices use the network of the data center, which is slower than the links within a slice.
    beyond = sum(each.bytes for each in exchanges if each.between_slices)
    inside = sum(each.bytes for each in exchanges if not each.between_slices)
    links = inside / bandwidth if inside else 0.0
    network = beyond / chip.network_bandwidth if beyond and chip.network_bandwidth else 0.0
    waiting = sum(each.bytes for each in exchanges if not each.asynchronous) / bandwidth
    # Asynchronous exchanges can overlap with computation, synchronous ones cannot.
    step = max(compute + waiting, links, network)

    return Timing(
        model_flops=flops,
        peak=flops / devices / chip.peak_bf16_flops,
        compute=compute,
        links=links,
        network=network,
        waiting=waiting,
        tokens_per_second=step_tokens(stage) / step,
        days=stage.steps * step / _SECONDS_A_DAY,
        model_flops_utilization=flops / devices / chip.peak_bf16_flops / step,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeTiming:
    """A lower bound of the time of a tick at the published bandwidths, and the rates with all slots in use.

    Attributes:
      memory: the seconds for reading and writing memory.
      links: the seconds for exchanges between devices.
      floor: the seconds for the bytes of the floor alone.
      ticks_per_second: the highest possible rate of ticks.
      tokens_per_second: the rate of tokens if every token takes all loops.
      tokens_per_second_at_mean: the rate if tokens take `loops_mean` loops on average, or None.
    """

    memory: float
    links: float
    floor: float
    ticks_per_second: float
    tokens_per_second: float
    tokens_per_second_at_mean: float | None

    @property
    def tick(self) -> float:
        """The best possible time of a tick."""
        return max(self.memory, self.links)


def decode_timing(
    target: Target, *, moved: int, floor: int, sent: int, slots: int, loops: int, loops_mean: float | None
) -> DecodeTiming | None:
    """Returns a lower bound of the time of a tick, or None if the bandwidths of the chip are not known.

    Args:
      target: the devices.
      moved: the bytes that a device reads and writes.
      floor: the bytes that it must move at least.
      sent: the bytes that it sends to other devices.
      slots: the number of slots.
      loops: the number of loops.
      loops_mean: the mean number of loops of a token, if tokens exit early.
    """
    chip, bandwidth = target.chip, target.link_bandwidth
    if chip is None or bandwidth is None:
        return None

    # A tick is bound by memory: with few slots, each weight is used in few products.
    memory, links = moved / chip.hbm_bandwidth, sent / bandwidth if sent else 0.0
    ticks = 1 / max(memory, links)
    # A token takes one tick for each of its loops.
    return DecodeTiming(
        memory=memory,
        links=links,
        floor=floor / chip.hbm_bandwidth,
        ticks_per_second=ticks,
        tokens_per_second=ticks * slots / loops,
        tokens_per_second_at_mean=ticks * slots / loops_mean if loops_mean else None,
    )
