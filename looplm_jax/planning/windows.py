"""How much of its operands an instruction reads, and how much of its result it writes, fusions looked into."""

import dataclasses
import re

from looplm_jax.planning.hlo import ArrayShape, Computation, Instruction, Program, array_shapes

_SLICES = ("slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start")
_UPDATES = ("dynamic-update-slice", "scatter")
_ELEMENT_BY_ELEMENT = ("bitcast", "convert", "copy", "reshape", "transpose")
_NUMBER = re.compile(r"(\d+)\)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """Elements of a result that are written; into the array of the operand `target` where that is updated in place."""

    elements: int
    target: str | None = None


def parameter_number(parameter: Instruction) -> int:
    """Returns which argument of its computation a parameter is."""
    found = _NUMBER.match(parameter.rest)
    assert found is not None
    return int(found[1])


def elements_read(program: Program, user: Instruction, position: int, shape: str) -> int:
    """Returns how many elements an instruction reads of its operand at a position, which has the given shape."""
    if user.opcode in _SLICES and position == 0:
        return sum(array.elements for array in results(user))
    if user.opcode in _UPDATES and position < len(results(user)):
        return 0
    if user.opcode == "fusion":
        fused = program.computations[user.called[0]]
        return _read_in_fusion(program, fused, _parameter(fused, position))
    return elements(shape)


def elements_written(program: Program, scope: Computation, each: Instruction) -> list[Write]:
    """Returns what an instruction of a computation writes of each array of its result."""
    if each.opcode == "fusion":
        fused, operands = program.computations[each.called[0]], each.operands
        return [
            dataclasses.replace(write, target=write.target and operands[parameter_number(fused.named(write.target))])
            for write in _written_in_fusion(program, fused, fused.root)
        ]
    if each.opcode in _UPDATES:
        targets = each.operands[: len(results(each))]
        update = each.operands[1] if each.opcode == "dynamic-update-slice" else each.operands[-1]
        return [Write(elements=elements(scope.shape_of(update)), target=target) for target in targets]
    return [Write(elements=array.elements) for array in results(each)]


def results(each: Instruction) -> list[ArrayShape]:
    """Returns the arrays that an instruction makes. What starts one in the background lists its operands, too."""
    arrays = array_shapes(each.shape)
    if not each.opcode.endswith("-start") or len(arrays) == 1:
        return arrays
    at = 0 if each.opcode == "copy-start" else min(len(each.operands), len(arrays) - 1)
    return arrays[at : at + 1]


def elements(shape: str) -> int:
    """Returns the elements of all arrays of a shape."""
    return sum(array.elements for array in array_shapes(shape))


def _parameter(fused: Computation, number: int) -> Instruction:
    parameters = (each for each in fused.instructions if each.opcode == "parameter")
    return next(each for each in parameters if parameter_number(each) == number)


def _read_in_fusion(program: Program, fused: Computation, value: Instruction) -> int:
    """Elements of a value that its users inside of a fusion read."""
    whole = elements(value.shape)
    total = whole if value.is_root else 0
    for user in fused.instructions:
        for position, name in enumerate(user.operands):
            if name != value.name or user.opcode == "tuple":
                continue
            passed_on = user.opcode in _ELEMENT_BY_ELEMENT
            total += (
                _read_in_fusion(program, fused, user)
                if passed_on
                else elements_read(program, user, position, value.shape)
            )
    return min(total, whole)


def _written_in_fusion(program: Program, fused: Computation, value: Instruction) -> list[Write]:
    """What a fusion writes of each array of a value; targets are parameters of the fusion."""
    fresh = [Write(elements=array.elements) for array in array_shapes(value.shape)]
    match value.opcode:
        case "tuple":
            parts = (_written_in_fusion(program, fused, fused.named(name)) for name in value.operands)
            return [write for part in parts for write in part]
        case "parameter":
            return [Write(elements=0, target=value.name)]
        case "bitcast":
            return _written_in_fusion(program, fused, fused.named(value.operands[0]))
        case "fusion" | "dynamic-update-slice" | "scatter":
            found: list[Write] = []
            for write, whole in zip(elements_written(program, fused, value), fresh, strict=True):
                (before, *_) = (
                    _written_in_fusion(program, fused, fused.named(write.target)) if write.target else [whole]
                )
                after = Write(elements=before.elements + write.elements, target=before.target)
                found.append(whole if before.target is None else after)
            return found
    return fresh
