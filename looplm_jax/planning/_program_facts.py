"""Facts about a compiled program: the exchanges between devices, matrix products, and attention kernels."""

import dataclasses
import math
import re
from collections import Counter, defaultdict

import numpy as np

from looplm_jax.planning._hlo import Program, Run, array_bytes, element_type

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"  # an all-reduce of which each device keeps its share
_STARTED = '"AsyncCollectiveStart"'
_CHANNEL = re.compile(r"channel_id=(\d+)")
_LISTED_GROUPS = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")

_PRODUCTS = ("dot", "convolution")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GATE = re.compile(r"^(LoopLM\.\w+/)*gate/")

Groups = tuple[tuple[int, ...], ...]  # of devices that exchange with each other


# Collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind and group size inside the same loops.

    Attributes:
      kind: the kind, such as `all-gather`.
      loops: the names of the enclosing loops, outermost first.
      devices: the number of devices that take part, or of slices if it is `between_slices`.
      count: how often a step runs them.
      bytes: the bytes that each device sends in one step.
      between_slices: whether they use the network between slices.
      asynchronous: whether devices compute meanwhile, instead of waiting.
    """

    kind: str
    loops: tuple[str, ...]
    devices: int
    count: int
    bytes: int
    between_slices: bool = False
    asynchronous: bool = False

    @property
    def in_loop_over_t(self) -> bool:
        """Whether it runs in every loop of the model."""
        return "loops" in self.loops


def collectives(program: Program, devices: int, slices: int = 1) -> tuple[Collective, ...]:
    """Returns the collectives of a step, those that send most first.

    Args:
      program: the program.
      devices: the number of devices.
      slices: the number of slices that the devices are in.
    """
    totals: dict[tuple[str, tuple[str, ...], int, bool, bool], list[int]] = defaultdict(lambda: [0, 0])
    seen: set[tuple[str, str, str]] = set()

    for run in program.runs():
        between = _between_slices(run)
        kind = between or _kind(run)
        if kind is None or _is_repeated(run, seen):
            continue

        size = slices if between else max(map(len, replica_groups(run.instruction.rest, devices)))
        sent = _sent_between(kind, run, slices) if between else _sent(kind, run, size)
        total = totals[kind, run.loops, size, between is not None, between is not None or _is_asynchronous(run)]
        total[0] += run.times
        total[1] += sent * run.times

    found = [
        Collective(
            kind=kind,
            loops=loops,
            devices=size,
            between_slices=between,
            asynchronous=asynchronous,
            count=count,
            bytes=sent,
        )
        for (kind, loops, size, between, asynchronous), (count, sent) in totals.items()
        if size > 1  # groups of one device exchange nothing
    ]
    return tuple(sorted(found, key=lambda each: -each.bytes))


def replica_groups(attributes: str, devices: int) -> Groups:
    """Returns which devices exchange with each other, from any of the forms that XLA prints.

    Args:
      attributes: the text of the instruction after its opcode.
      devices: the number of devices.
    """
    # {{0,1},{2,3}}
    listed = _LISTED_GROUPS.search(attributes)
    if listed:
        return _parse_lists(listed[1])

    pairs = _PAIRS.search(attributes)
    if pairs:
        return _parse_lists(pairs[1])

    # [groups,size]<=[dimensions]T(order): the numbers of the devices, reshaped and transposed.
    iota = _IOTA_GROUPS.search(attributes)
    if iota:
        grid = np.arange(math.prod(_numbers(iota[3]))).reshape(_numbers(iota[3]))
        order = _numbers(iota[4]) if iota[4] else tuple(range(grid.ndim))
        return _rows(grid.transpose(order).reshape(int(iota[1]), int(iota[2])))

    # mesh['data'=2, 'fsdp'=4] {'fsdp'}: the axes over which devices exchange.
    mesh = _MESH_GROUPS.search(attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        exchanging = re.findall(r"'([^']*)'", mesh[2])
        grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        axes = [list(sizes).index(name) for name in exchanging]
        last = np.moveaxis(grid, axes, range(-len(axes), 0))
        return _rows(last.reshape(-1, math.prod(sizes[name] for name in exchanging)))

    return (tuple(range(devices)),)  # without groups, all devices exchange with all


def _kind(run: Run) -> str | None:
    """Returns the kind of collective that an instruction is, or None."""
    opcode = run.instruction.opcode.removesuffix("-start")
    if opcode == "all-reduce" and run.computation.name.startswith(_FUSED_REDUCE_SCATTER):
        return "reduce-scatter"
    return opcode if opcode in _KINDS else None


def _is_asynchronous(run: Run) -> bool:
    """Whether it is started here and awaited later. On TPUs, the fusion around it may be marked as asynchronous."""
    return run.asynchronously or (run.fused and any(_STARTED in each.rest for each in run.computation.instructions))


def _is_repeated(run: Run, seen: set[tuple[str, str, str]]) -> bool:
    """Whether the same collective was seen before. It is added to `seen`.

    TPU programs contain an asynchronous collective once in each fusion that it overlaps with, under one channel.
    """
    channel = _CHANNEL.search(run.instruction.rest)
    if not run.fused or channel is None:
        return False
    key = run.region, channel[1], run.instruction.opcode
    repeated = key in seen
    seen.add(key)
    return repeated


def _sent(kind: str, run: Run, size: int) -> int:
    """Returns the bytes that each of `size` devices sends in one exchange, assuming rings, which send the least."""
    arrays = array_bytes(run.instruction.shape)
    if run.instruction.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = _results(arrays)

    total, others = sum(arrays), (size - 1) / size
    if kind == "collective-permute":
        return total
    if kind == "reduce-scatter" and run.instruction.opcode.startswith("reduce-scatter"):
        return total * (size - 1)  # the shape is that of one shard
    return int(total * others * (2 if kind == "all-reduce" else 1))


def _results(arrays: list[int]) -> list[int]:
    """Returns the sizes of the results of an asynchronous start, whose shape also has operands and small flags."""
    real = [size for size in arrays if size > 4] or arrays
    return real[len(real) // 2 :]


def _between_slices(run: Run) -> str | None:
    """Returns the kind of an exchange between slices, or None.

    A TPU sends its shard to its host, which sends it to the other hosts.
    """
    found = _MEGASCALE.search(run.instruction.rest) if run.instruction.opcode == "send" else None
    return found[1].lower().replace("_", "-") if found else None


def _sent_between(kind: str, run: Run, slices: int) -> int:
    """Returns the bytes that each device sends to other slices.

    An all-reduce sends twice the shard except for its own portion; other kinds send the shard to each other slice.
    """
    share = array_bytes(run.instruction.shape)[0]
    return share * 2 * (slices - 1) // slices if kind == "all-reduce" else share * (slices - 1)


def _parse_lists(text: str) -> Groups:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,]*)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _rows(grid: np.ndarray) -> Groups:
    return tuple(map(tuple, grid.tolist()))


# Kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Matmuls:
    """The matrix products of a program. Each counts once, however often its loop runs.

    Attributes:
      by_type: their number by the type of their operands.
      float32_at: the names of those in float32 in a program whose products should be in bfloat16. The exit gate, which
        is in float32 by design, is not among them.
    """

    by_type: dict[str, int]
    float32_at: tuple[str, ...]


def matmuls(program: Program, expected: str) -> Matmuls:
    """Returns the matrix products of a program.

    Args:
      program: the program.
      expected: the type that their operands should have, as XLA names it.
    """
    runs = [run for run in program.runs() if run.instruction.opcode in _PRODUCTS or _is_library(run)]
    types = Counter(_operand_type(run) for run in runs)
    wide = {_place(run.instruction.op_name) for run in runs if _operand_type(run) == "f32"}
    outside = sorted(name for name in wide if not _GATE.search(name)) if expected == "bf16" else []
    return Matmuls(by_type=dict(sorted(types.items())), float32_at=tuple(outside))


def attention_kernel(program: Program) -> str:
    """Returns what computes self-attention: `splash`, `cudnn`, `triton` or `xla`."""
    names = [run.instruction.name for run in program.runs() if run.instruction.opcode == "custom-call"]
    if any(name.startswith("splash_") for name in names):
        return "splash"
    targets = custom_calls(program)
    if any("fmha" in target for target in targets):
        return "cudnn"
    return "triton" if any("gpu.triton" in target for target in targets) else "xla"


def custom_calls(program: Program) -> tuple[str, ...]:
    """Returns the names of the kernels that XLA did not generate."""
    calls = [run for run in program.runs() if run.instruction.opcode == "custom-call"]
    named = {target[1] for run in calls if (target := _TARGET.search(run.instruction.rest))}
    kernels = {run.instruction.name.rsplit(".", 1)[0] for run in calls if '"tpu_custom_call"' in run.instruction.rest}
    return tuple(sorted((named - {"tpu_custom_call"}) | kernels))


def _operand_type(run: Run) -> str:
    """Returns the wider type of the two operands."""
    shapes = [run.computation.shape_of(name) for name in run.instruction.operands[:2]]
    types = [element_type(shape) for shape in shapes]
    return "f32" if "f32" in types else next((each for each in types if each), element_type(run.instruction.shape))


def _is_library(run: Run) -> bool:
    """Whether an instruction calls a matrix product of a library."""
    target = _TARGET.search(run.instruction.rest) if run.instruction.opcode == "custom-call" else None
    return target is not None and any(word in target[1] for word in ("gemm", "matmul"))


def _place(op_name: str) -> str:
    """Returns a name from the module of the model on, without the wrappers of scans and rematerialization."""
    inner = op_name.rsplit("LoopLM.loop_step/", 1)[-1]
    return re.sub(r"(while|body|closed_call|checkpoint|rematted_computation|jit\(\w+\))/", "", inner)
