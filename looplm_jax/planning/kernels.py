"""What a compiled program multiplies matrices in, and what computes its attention."""

import dataclasses
import re
from collections import Counter

from looplm_jax.planning.hlo import Program, Run, element_type

_PRODUCTS = ("dot", "convolution")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GATE = re.compile(r"^(LoopLM\.\w+/)*gate/")


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
    """The name from the module of the model on, without what scans and rematerialisation wrap around it."""
    inner = op_name.rsplit("LoopLM.loop_step/", 1)[-1]
    return re.sub(r"(while|body|closed_call|checkpoint|rematted_computation|jit\(\w+\))/", "", inner)
