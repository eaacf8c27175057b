"""The best possible time of a step: what arithmetic and links allow where only synchronous exchanges wait."""

import dataclasses
from collections.abc import Sequence

from looplm_jax.config import ModelConfig, Objective, Remat, Stage
from looplm_jax.planning.collectives import Collective
from looplm_jax.planning.targets import Target
from looplm_jax.training.flops import forward_flops_per_token, train_flops_per_token

_SECONDS_A_DAY = 86400


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
    model_flops_utilisation: float  # at best

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
        model_flops_utilisation=flops / devices / chip.peak_bf16_flops / step,
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
