"""Counts the bytes that a compiled program reads from and writes to the main memory of a chip, by kind of array.

Each instruction counts with the bytes that it reads of its operands and the bytes that it writes, as often as its loops
run. If an operand is only sliced, the slice is read; if an array is updated in place, the update is written. Arrays in
the faster memory that the compiler manages cost nothing, and copying an array there reads it.
"""

import dataclasses
import enum
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from looplm_jax.planning._hlo import ArrayShape, Computation, Instruction, Program, arrays_in_shape

_SAME_VALUE = ("bitcast", "opt-barrier", "add-dependency", "domain")
_NO_WORK = ("constant", "after-all", "partition-id", "replica-id")
_COMPUTES = ("dot", "convolution", "reduce", "reduce-window", "custom-call")  # other instructions only move data
_INDEX = re.compile(r"index=(\d+)")
_ALIASES = re.compile(r"output_to_operand_aliasing=\{((?:\{[^{}]*\}: \(\d+, \{[^{}]*\}\)(?:, )?)+)\}")
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+),")
_DECLARED = re.compile(r'"bytes_accessed":"?(\d+)')
_KERNEL = 'custom_call_target="tpu_custom_call"'

_SLICES = ("slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start")
_UPDATES = ("dynamic-update-slice", "scatter")
_ELEMENT_BY_ELEMENT = ("bitcast", "convert", "copy", "reshape", "transpose")
_NUMBER = re.compile(r"(\d+)\)")


class Buffer(enum.Enum):
    """A kind of array. Copies of the weights are temporaries."""

    WEIGHTS = "weights"
    HEAD = "head"
    CACHE = "cache"
    CACHE_COPY = "copies of the cache"
    TEMPORARY = "temporaries"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes read from and written to main memory."""

    read: Counter[Buffer] = dataclasses.field(default_factory=Counter)
    written: Counter[Buffer] = dataclasses.field(default_factory=Counter)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(read=self.read + other.read, written=self.written + other.written)

    def times(self, count: int) -> "Traffic":
        """Returns the traffic of `count` runs."""
        return Traffic(read=_scaled(self.read, count), written=_scaled(self.written, count))

    @property
    def total(self) -> int:
        """The bytes in both directions."""
        return self.read.total() + self.written.total()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheUse:
    """The bytes of the cache that attention in one layer uses, where the program does not determine them.

    Hand-written kernels are assumed to read and write these bytes for each slot in every call, and loops whose length
    depends on data to run until they have read them.

    Attributes:
      slots: the number of slots.
      read: the bytes read for each slot.
      written: the bytes written for each slot.
    """

    slots: int = 1
    read: int = 0
    written: int = 0


_Value: TypeAlias = "Buffer | tuple[_Value, ...]"  # the kind of an array, or of each element of a tuple


def program_traffic(program: Program, holds: Callable[[str], Buffer], cache: CacheUse = CacheUse()) -> Traffic:
    """Returns the traffic of one run of a program. Of the branches of a condition, the one that moves most counts.

    Args:
      program: the program.
      holds: returns the kind of a parameter of the program, given its name in the traced function, such as
        `params['head']`.
      cache: the use of the cache, where the program does not determine it.
    """
    entry = program.computations[program.entry]
    parameters = sorted((each for each in entry.instructions if each.opcode == "parameter"), key=parameter_number)
    _, moved = _Count(program, cache).computation(entry, [holds(each.op_name) for each in parameters])
    return moved


class _Count:
    """Walks through a program and tracks the kind of every array."""

    def __init__(self, program: Program, cache: CacheUse):
        self._program = program
        self._cache = cache

    def computation(self, computation: Computation, arguments: Sequence[_Value]) -> tuple[_Value, Traffic]:
        """Returns the kind of the result of a computation, given the kinds of its arguments, and its traffic."""
        values: dict[str, _Value] = {}
        shapes = {each.name: each.shape for each in computation.instructions}
        moved = Traffic()

        for each in computation.instructions:
            if each.opcode == "parameter":
                values[each.name] = arguments[parameter_number(each)]
                continue

            operands = [_Operand(name=name, value=values[name], shape=shapes[name]) for name in each.operands]
            values[each.name], own = self._instruction(computation, each, operands)
            moved += own

        return values[computation.root.name], moved

    def _instruction(
        self, scope: Computation, each: Instruction, operands: Sequence["_Operand"]
    ) -> tuple[_Value, Traffic]:
        """Returns the kind of the result of an instruction, and its traffic."""
        nothing, values = Traffic(), [operand.value for operand in operands]

        match each.opcode:
            case "tuple":
                return tuple(values), nothing
            case "get-tuple-element":
                return _item(values[0], each), nothing
            case "while":
                # The state of a loop keeps its shapes, so its arrays are taken to keep their kinds, and one iteration
                # stands for all.
                _, once = self.computation(self._program.computations[each.called[0]], values)
                return values[0], once.times(self._program.trip_count(each) or self._trips_of_data(once))
            case "call" | "async-start":
                return self.computation(self._program.computations[each.called[0]], values)
            case "conditional":
                # The first operand chooses the branch; each of the others is the argument of one branch.
                branches = [self._program.computations[name] for name in each.called]
                done = [self.computation(branch, [value]) for branch, value in zip(branches, values[1:], strict=True)]
                return max(done, key=lambda pair: pair[1].total)
            case "custom-call":
                return self._custom_call(each, operands)
            # The bytes of an asynchronous operation are counted where it starts.
            case opcode if opcode in _SAME_VALUE or opcode.endswith(("-done", "-update")):
                return values[0], nothing
            case opcode if opcode in _NO_WORK:
                return Buffer.TEMPORARY, nothing

        return self._work(scope, each, operands)

    def _trips_of_data(self, once: Traffic) -> int:
        """Returns how often a loop whose length depends on data runs, given the traffic of one iteration."""
        # The only such loop of a tick walks through the pages of the cache.
        return -(-self._cache.read // once.read[Buffer.CACHE]) if once.read[Buffer.CACHE] else 1

    def _work(self, scope: Computation, each: Instruction, operands: Sequence["_Operand"]) -> tuple[_Value, Traffic]:
        """Returns the kind of the result of an instruction that reads and writes memory, and its traffic."""
        made = results(each)
        # By name, because the target of an update is given by name.
        holds = {operand.name: operand.buffer for operand in operands}
        # An instruction that only moves data of the cache makes a copy of it.
        moves_cache = not self._computes(each) and bool({Buffer.CACHE, Buffer.CACHE_COPY} & set(holds.values()))
        moved, values, copies = Traffic(), [], False

        for result, write in zip(made, elements_written(self._program, scope, each), strict=True):
            fresh = Buffer.CACHE_COPY if moves_cache else Buffer.TEMPORARY
            values.append(fresh if write.target is None else holds[write.target])
            moved.written[values[-1]] += _share(result, write.elements)
            copies |= moves_cache and write.target is None and result.in_main_memory

        # Reading the cache in order to copy it is part of the cost of the copy, not of attention.
        for position, operand in enumerate(operands):
            wanted = elements_read(self._program, each, position, operand.shape)
            source = Buffer.CACHE_COPY if copies and operand.buffer is Buffer.CACHE else operand.buffer
            moved.read[source] += sum(_share(array, wanted) for array in arrays_in_shape(operand.shape))

        return _as_result(values, each), moved

    def _computes(self, each: Instruction) -> bool:
        """Whether an instruction does more than move data."""
        if each.opcode != "fusion":
            return each.opcode in _COMPUTES
        return any(map(self._computes, self._program.computations[each.called[0]].instructions))

    def _custom_call(self, each: Instruction, operands: Sequence["_Operand"]) -> tuple[_Value, Traffic]:
        """Returns the kind of the result of a custom call, and its traffic."""
        if _KERNEL not in each.rest:  # an annotation of the compiler, or an allocation
            return operands[0].value if operands else Buffer.TEMPORARY, Traffic()

        moved, made, aliases = Traffic(), arrays_in_shape(each.shape), _aliases(each)
        # A result that is an operand updated in place keeps its kind. How much of it is written, its shape cannot show.
        values = [operands[aliases[at]].buffer if at in aliases else Buffer.TEMPORARY for at in range(len(made))]

        for at, result in enumerate(made):
            if at not in aliases:
                moved.written[Buffer.TEMPORARY] += _share(result, result.elements)

        for operand in operands:
            if operand.buffer is not Buffer.CACHE:
                moved.read[operand.buffer] += sum(
                    _share(array, array.elements) for array in arrays_in_shape(operand.shape)
                )

        # What a kernel reads of the cache depends on data. Other kernels declare the bytes that they access.
        if any(operand.buffer is Buffer.CACHE for operand in operands):
            moved.read[Buffer.CACHE] += self._cache.slots * self._cache.read
            moved.written[Buffer.CACHE] += self._cache.slots * self._cache.written if Buffer.CACHE in values else 0
        elif declared := _DECLARED.search(each.rest):
            # A kernel may read an operand more than once, or only parts of it. The bytes that it declares are taken for
            # those of the kind that most bytes of its operands have.
            largest = max(moved.read, key=moved.read.__getitem__, default=Buffer.TEMPORARY)
            moved.read.clear()
            moved.read[largest] = max(int(declared[1]) - moved.written.total(), 0)

        return _as_result(values, each), moved


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Operand:
    """An operand of an instruction, with its kind."""

    name: str
    value: _Value
    shape: str

    @property
    def buffer(self) -> Buffer:
        """The kind of the array, or of the first array of a tuple."""
        value = self.value
        while isinstance(value, tuple):
            value = value[0] if value else Buffer.TEMPORARY
        return value


def _item(value: _Value, each: Instruction) -> _Value:
    index = _INDEX.search(each.rest)
    assert index is not None
    return value[int(index[1])] if isinstance(value, tuple) else value


def _as_result(values: Sequence[_Value], each: Instruction) -> _Value:
    return tuple(values) if each.shape.startswith("(") and not each.opcode.endswith("-start") else values[0]


def _share(array: ArrayShape, elements: int) -> int:
    """Returns the bytes of `elements` elements of an array in main memory, with their portion of its padding."""
    whole = array.elements
    return array.bytes * min(elements, whole) // whole if array.in_main_memory and whole else 0


def _scaled(counts: Counter[Buffer], factor: int) -> Counter[Buffer]:
    return Counter({buffer: factor * count for buffer, count in counts.items()})


def _aliases(each: Instruction) -> dict[int, int]:
    """Returns which results of a custom call are operands that it updates in place, as indices of operands."""
    found = _ALIASES.search(each.rest)
    pairs = _ALIAS.findall(found[1]) if found else []
    return {int(result or 0): int(operand) for result, operand in pairs}


# Windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """The elements of a result that are written.

    `target` is the operand whose array is updated in place, or None if the result is a new array.
    """

    elements: int
    target: str | None = None


def parameter_number(parameter: Instruction) -> int:
    """Returns the index of a parameter among the arguments of its computation."""
    found = _NUMBER.match(parameter.rest)
    assert found is not None
    return int(found[1])


def elements_read(program: Program, user: Instruction, position: int, shape: str) -> int:
    """Returns how many elements an instruction reads of one of its operands.

    Args:
      program: the program.
      user: the instruction.
      position: the index of the operand.
      shape: the shape of the operand.
    """
    # The other operands of a slice are its indices.
    if user.opcode in _SLICES and position == 0:
        return sum(array.elements for array in results(user))
    # An array that is updated in place is not read, only written.
    if user.opcode in _UPDATES and position < len(results(user)):
        return 0
    if user.opcode == "fusion":
        fused = program.computations[user.called[0]]
        return _read_in_fusion(program, fused, _parameter(fused, position))

    return elements(shape)


def elements_written(program: Program, scope: Computation, each: Instruction) -> list[Write]:
    """Returns what an instruction in a computation `scope` writes of each array of its result."""
    # Targets within a fusion are its parameters, which become operands of the fusion itself.
    if each.opcode == "fusion":
        fused, operands = program.computations[each.called[0]], each.operands
        return [
            dataclasses.replace(write, target=write.target and operands[parameter_number(fused.named(write.target))])
            for write in _written_in_fusion(program, fused, fused.root)
        ]

    if each.opcode in _UPDATES:
        targets = each.operands[: len(results(each))]
        # Operands of a dynamic-update-slice: array, update, indices; of a scatter: arrays, indices, updates.
        update = each.operands[1] if each.opcode == "dynamic-update-slice" else each.operands[-1]
        return [Write(elements=elements(scope.shape_of(update)), target=target) for target in targets]

    return [Write(elements=array.elements) for array in results(each)]


def results(each: Instruction) -> list[ArrayShape]:
    """Returns the arrays that an instruction produces."""
    arrays = arrays_in_shape(each.shape)
    if not each.opcode.endswith("-start") or len(arrays) == 1:
        return arrays

    # The shape of an asynchronous start also contains its operands.
    at = 0 if each.opcode == "copy-start" else min(len(each.operands), len(arrays) - 1)
    return arrays[at : at + 1]


def elements(shape: str) -> int:
    """Returns the number of elements of all arrays of a shape."""
    return sum(array.elements for array in arrays_in_shape(shape))


def _parameter(fused: Computation, number: int) -> Instruction:
    parameters = (each for each in fused.instructions if each.opcode == "parameter")
    return next(each for each in parameters if parameter_number(each) == number)


def _read_in_fusion(program: Program, fused: Computation, value: Instruction) -> int:
    """Returns how many elements of a value its users in a fusion read."""
    whole = elements(value.shape)
    # A parameter that is the result is copied as a whole.
    total = whole if value.is_root else 0

    for user in fused.instructions:
        for position, name in enumerate(user.operands):
            if name != value.name or user.opcode == "tuple":
                continue
            # The compiler computes only the elements that are used, so users of such a value decide what is read.
            passed_on = user.opcode in _ELEMENT_BY_ELEMENT
            total += (
                _read_in_fusion(program, fused, user)
                if passed_on
                else elements_read(program, user, position, value.shape)
            )

    # Several users may read the same elements, which are fetched once.
    return min(total, whole)


def _written_in_fusion(program: Program, fused: Computation, value: Instruction) -> list[Write]:
    """Returns what a fusion writes of each array of a value. Targets are parameters of the fusion."""
    fresh = [Write(elements=array.elements) for array in arrays_in_shape(value.shape)]

    match value.opcode:
        case "tuple":
            parts = (_written_in_fusion(program, fused, fused.named(name)) for name in value.operands)
            return [write for part in parts for write in part]
        case "parameter":
            return [Write(elements=0, target=value.name)]
        case "bitcast":
            return _written_in_fusion(program, fused, fused.named(value.operands[0]))
        # An update of an update: the target is that of the innermost, and all their elements are written. If the
        # innermost target is a new array, the whole array is written.
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
