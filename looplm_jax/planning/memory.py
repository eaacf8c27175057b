"""Bytes that a train step takes on each device, by what they hold."""

import dataclasses
import math
import re
from typing import Any

import jax
from jaxtyping import PyTree

from looplm_jax.training.state import TrainState

_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", re.IGNORECASE)
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_ALIAS = re.compile(r"\{[\d, ]*\}: \((\d+), \{[\d, ]*\}, (?:may|must)-alias\)")


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
