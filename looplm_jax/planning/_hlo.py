"""Parses a compiled program as XLA prints it: its instructions, how often each runs, and inside which loops."""

import dataclasses
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END_OF_THREAD = "}, execution_thread="
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^s32\[\]\S* constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_WITH_LAYOUT = re.compile(_ARRAY.pattern + r"(?:\{([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_MEMORY_SPACE = re.compile(r"S\((\d+)\)")
_OPERAND = re.compile(r"%([\w.\-]+)")
_BITS = {"pred": 8, "bf16": 16, "token": 0}
_CALLS_OTHERS = ("fusion", "call", "conditional", "async-start")

# The scans of the train step, recognized by the end of the name that JAX gives them.
_LOOP_NAMES = (
    ("LoopLM.prefill/while", "loops"),
    ("core/while", "layers"),
    ("jit(train_step)/while", "accumulation"),
    ("jit(train_step)/shard_map/while", "accumulation"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """One instruction: its name, the shape of its result, its opcode, and the rest of its line."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool = False

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it came from."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        return _OPERAND.findall(self.rest[: _closing(self.rest, 0)])

    @property
    def called(self) -> list[str]:
        """The names of the computations that it runs: a fusion or a call, the body of a loop, or branches."""
        branches = _BRANCHES.search(self.rest)
        return _CALLED.findall(self.rest) + (_OPERAND.findall(branches[1]) if branches else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computation:
    """Instructions that run together, such as the body of a loop or of a fusion."""

    name: str
    instructions: tuple[Instruction, ...]

    def shape_of(self, name: str) -> str:
        """Returns the shape of the instruction of that name, or an empty string."""
        return next((each.shape for each in self.instructions if each.name == name), "")

    def named(self, name: str) -> Instruction:
        """Returns the instruction of that name."""
        return next(each for each in self.instructions if each.name == name)

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        return next((each for each in self.instructions if each.is_root), self.instructions[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """An instruction in the execution of a step.

    Attributes:
      instruction: the instruction.
      computation: its computation.
      times: how often it runs.
      loops: the names of the enclosing loops, outermost first.
      region: the name of the innermost computation around it that is not a fusion.
      fused: whether it is in a fusion.
      asynchronously: whether other instructions start it and wait for it.
    """

    instruction: Instruction
    computation: Computation
    times: int
    loops: tuple[str, ...]
    region: str
    fused: bool
    asynchronously: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A program: its computations by name, and the name of the first."""

    entry: str
    computations: dict[str, Computation]

    def runs(self) -> Iterator[Run]:
        """Yields every instruction that runs.

        All branches of a condition count, and a loop whose length depends on data counts once.
        """
        yield from self._visit(self.entry, 1, (), self.entry, fused=False)

    def _visit(
        self,
        name: str,
        times: int,
        loops: tuple[str, ...],
        region: str,
        *,
        fused: bool,
        asynchronously: bool = False,
    ) -> Iterator[Run]:
        """Yields the instructions of a computation and of those that it runs."""
        computation = self.computations[name]

        for each in computation.instructions:
            yield Run(
                instruction=each,
                computation=computation,
                times=times,
                loops=loops,
                region=region,
                fused=fused,
                asynchronously=asynchronously or each.opcode.endswith("-start"),
            )
            if each.opcode == "while":
                # `called` has the body alone; the condition does no work that counts.
                body = each.called[0]
                inner = (*loops, _loop_name(each.op_name))
                yield from self._visit(body, times * (self.trip_count(each) or 1), inner, body, fused=False)
            elif each.opcode in _CALLS_OTHERS:
                inside = fused or each.opcode == "fusion"
                started = asynchronously or each.opcode == "async-start"
                # Not every computation that is named is printed.
                for called in filter(self.computations.__contains__, each.called):
                    yield from self._visit(called, times, loops, region, fused=inside, asynchronously=started)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns how often a loop runs, or None where that depends on data.

        XLA prints the number, or it is the constant that the loop's counter is compared with: scans count up from 0.
        """
        known = _TRIP_COUNT.search(loop.rest)
        if known:
            return int(known[1])
        # With two constants in the condition, either could be the limit.
        condition = _CONDITION.search(loop.rest)
        lines = self.computations[condition[1]].instructions if condition else ()
        limits = [found for each in lines if (found := _CONSTANT.match(f"{each.shape} {each.opcode}({each.rest}"))]
        return int(limits[0][1]) if len(limits) == 1 else None


def parse(text: str) -> Program:
    """Returns the program in the text that `compiled.as_text()` returns."""
    computations: dict[str, Computation] = {}
    entry, name = "", ""
    lines: list[str] = []

    # A computation is a header, one line per instruction, and a closing brace in the first column.
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, lines = header[2], []
            entry = name if header[1] else entry
        elif line == "}" or line.startswith(_END_OF_THREAD):
            parsed = (_parse_instruction(each) for each in lines)
            computations[name] = Computation(name=name, instructions=tuple(filter(None, parsed)))
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:
            lines[-1] += line  # attributes of TPU kernels take several lines

    return Program(entry=entry, computations=computations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayShape:
    """An array in a program.

    Attributes:
      elements: the number of elements.
      bytes: the size, including the padding to whole tiles.
      in_main_memory: whether it is in the main memory of the device. Scalars and other arrays can be in a faster memory
        that the compiler manages, and offloaded arrays are on the host.
    """

    elements: int
    bytes: int
    in_main_memory: bool


def arrays_in_shape(shape: str) -> list[ArrayShape]:
    """Returns the arrays of a shape: one, or those of a tuple, including nested tuples."""
    return [_array_shape(*found) for found in _WITH_LAYOUT.findall(shape)]


def array_bytes(shape: str) -> list[int]:
    """Returns the bytes of each array of a shape, without padding."""
    return [_elements(dims) * element_bits(dtype) // 8 for dtype, dims in _ARRAY.findall(shape)]


def element_type(shape: str) -> str:
    """Returns the element type of the first array of a shape, such as `bf16`, or an empty string."""
    found = _ARRAY.search(shape)
    return found[1] if found else ""


def element_bits(dtype: str) -> int:
    """Returns the bits of one element of a type, given by its name in XLA."""
    digits = re.search(r"\d+", dtype)
    return _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 0


def _parse_instruction(line: str) -> Instruction | None:
    """Returns the instruction in a line, or None."""
    start = _INSTRUCTION.match(line)
    if start is None:
        return None

    # The shape of a tuple contains spaces and parentheses, so the opcode is searched for after its end.
    at = start.end()
    shape_end = _closing(line, at + 1) + 1 if line[at] == "(" else at
    opcode = _OPCODE.search(line, shape_end if shape_end > at else at)
    if opcode is None:
        return None

    return Instruction(
        name=start[2],
        shape=line[at : opcode.start()],
        opcode=opcode[1],
        rest=line[opcode.end() :],
        is_root=start[1] is not None,
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one just before `start`."""
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    return len(text)


def _array_shape(dtype: str, dims: str, layout: str) -> ArrayShape:
    space = _MEMORY_SPACE.search(layout)
    padded = _padded_elements([int(size) for size in dims.split(",") if size], layout)
    return ArrayShape(
        elements=_elements(dims),
        bytes=padded * element_bits(dtype) // 8,
        # Scalars have no dims. Memory space 0 is the default, and is not printed.
        in_main_memory=bool(dims) and (space is None or space[1] == "0"),
    )


def _padded_elements(dims: list[int], layout: str) -> int:
    """Returns the number of elements including the padding to whole tiles.

    The last size of a tile is that of the axis that varies fastest.
    """
    # A layout such as `{1,0:T(8,128)(2,1)}`: the order of the axes, then tiles. The first determines the padding.
    tile = _TILE.search(layout)
    order = [int(axis) for axis in layout.partition(":")[0].split(",") if axis]
    if tile is None or len(order) != len(dims) or not dims:
        return math.prod(dims)

    fastest_first = [dims[axis] for axis in order]
    sizes = [int(size) for size in reversed(tile[1].split(","))]
    for at, size in enumerate(sizes[: len(dims)]):
        fastest_first[at] = -(-fastest_first[at] // size) * size
    return math.prod(fastest_first)


def _elements(dims: str) -> int:
    product = 1
    for size in dims.split(","):
        product *= int(size) if size else 1
    return product


def _loop_name(op_name: str) -> str:
    return next((name for end, name in _LOOP_NAMES if op_name.endswith(end)), "chunks")
