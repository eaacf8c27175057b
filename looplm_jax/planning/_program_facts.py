"""What a compiled program does: the exchanges between devices, matrix products, and attention kernels."""

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
    """All exchanges of one kind inside the same loops: how many a step, and what each device sends in them.

    `loops` names the loops from the outermost in. Where it is `between_slices`, `devices` is the number of slices.
    Devices compute during those that are `asynchronous`, and wait for the others.
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
        """Whether every loop of the model pays for it again."""
        return "loops" in self.loops


def collectives(program: Program, devices: int, slices: int = 1) -> tuple[Collective, ...]:
    """Every exchange of a step among `devices` devices in so many slices, largest first."""
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
        if size > 1
    ]
    return tuple(sorted(found, key=lambda each: -each.bytes))


def replica_groups(attributes: str, devices: int) -> Groups:
    """Which devices exchange with which, in any of the forms that XLA prints."""
    listed = _LISTED_GROUPS.search(attributes)
    if listed:
        return _parse_lists(listed[1])
    pairs = _PAIRS.search(attributes)
    if pairs:
        return _parse_lists(pairs[1])
    iota = _IOTA_GROUPS.search(attributes)
    if iota:
        grid = np.arange(math.prod(_numbers(iota[3]))).reshape(_numbers(iota[3]))
        order = _numbers(iota[4]) if iota[4] else tuple(range(grid.ndim))
        return _rows(grid.transpose(order).reshape(int(iota[1]), int(iota[2])))
    mesh = _MESH_GROUPS.search(attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        exchanging = re.findall(r"'([^']*)'", mesh[2])
        grid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        axes = [list(sizes).index(name) for name in exchanging]
        last = np.moveaxis(grid, axes, range(-len(axes), 0))
        return _rows(last.reshape(-1, math.prod(sizes[name] for name in exchanging)))
    return (tuple(range(devices)),)  # no groups named: all exchange with all


def _kind(run: Run) -> str | None:
    opcode = run.instruction.opcode.removesuffix("-start")
    if opcode == "all-reduce" and run.computation.name.startswith(_FUSED_REDUCE_SCATTER):
        return "reduce-scatter"
    return opcode if opcode in _KINDS else None


def _is_asynchronous(run: Run) -> bool:
    """Whether it is started here and waited for later; a TPU may say so by what the fusion around it calls."""
    return run.asynchronously or (run.fused and any(_STARTED in each.rest for each in run.computation.instructions))


def _is_repeated(run: Run, seen: set[tuple[str, str, str]]) -> bool:
    """A TPU prints an asynchronous exchange once in each fusion that it overlaps with, under one channel."""
    channel = _CHANNEL.search(run.instruction.rest)
    if not run.fused or channel is None:
        return False
    key = run.region, channel[1], run.instruction.opcode
    repeated = key in seen
    seen.add(key)
    return repeated


def _sent(kind: str, run: Run, size: int) -> int:
    """Bytes that each of `size` devices sends in one exchange, in rings, which send the least."""
    arrays = array_bytes(run.instruction.shape)
    if run.instruction.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = _results(arrays)
    total, others = sum(arrays), (size - 1) / size
    if kind == "collective-permute":
        return total
    if kind == "reduce-scatter" and run.instruction.opcode.startswith("reduce-scatter"):
        return total * (size - 1)  # the shape is that of one share
    return int(total * others * (2 if kind == "all-reduce" else 1))


def _results(arrays: list[int]) -> list[int]:
    """Of an asynchronous start, whose shape lists operands, results and small marks of its own."""
    real = [size for size in arrays if size > 4] or arrays
    return real[len(real) // 2 :]


def _between_slices(run: Run) -> str | None:
    """The kind of an exchange between slices: a TPU sends its share to its host, and that to the other hosts."""
    found = _MEGASCALE.search(run.instruction.rest) if run.instruction.opcode == "send" else None
    return found[1].lower().replace("_", "-") if found else None


def _sent_between(kind: str, run: Run, slices: int) -> int:
    """Bytes that leave each device for other slices: of a sum twice all but its own share, else all it has to each."""
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
    """How many matrix products the program has of each type of operands, and where they are wider than meant.

    A product counts once, however often its loop runs. The exit gate is in float32 by design and not in `float32_at`.
    """

    by_type: dict[str, int]
    float32_at: tuple[str, ...]


def matmuls(program: Program, meant: str) -> Matmuls:
    """The matrix products of a program, whose operands are `meant` to be of one type, as XLA names it."""
    runs = [run for run in program.runs() if run.instruction.opcode in _PRODUCTS or _is_library(run)]
    types = Counter(_operand_type(run) for run in runs)
    wide = {_place(run.instruction.op_name) for run in runs if _operand_type(run) == "f32"}
    outside = sorted(name for name in wide if not _GATE.search(name)) if meant == "bf16" else []
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
    """The kernels that XLA did not write itself, by the names they are called under."""
    calls = [run for run in program.runs() if run.instruction.opcode == "custom-call"]
    named = {target[1] for run in calls if (target := _TARGET.search(run.instruction.rest))}
    kernels = {run.instruction.name.rsplit(".", 1)[0] for run in calls if '"tpu_custom_call"' in run.instruction.rest}
    return tuple(sorted((named - {"tpu_custom_call"}) | kernels))


def _operand_type(run: Run) -> str:
    """The widest type among the two operands."""
    shapes = [run.computation.shape_of(name) for name in run.instruction.operands[:2]]
    types = [element_type(shape) for shape in shapes]
    return "f32" if "f32" in types else next((each for each in types if each), element_type(run.instruction.shape))


def _is_library(run: Run) -> bool:
    target = _TARGET.search(run.instruction.rest) if run.instruction.opcode == "custom-call" else None
    return target is not None and any(word in target[1] for word in ("gemm", "matmul"))


def _place(op_name: str) -> str:
    """The name from the module of the model on, without what scans and rematerialization wrap around it."""
    inner = op_name.rsplit("LoopLM.loop_step/", 1)[-1]
    return re.sub(r"(while|body|closed_call|checkpoint|rematted_computation|jit\(\w+\))/", "", inner)
