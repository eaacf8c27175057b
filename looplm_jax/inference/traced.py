"""Settings as arguments of a compiled program: another value of theirs compiles nothing."""

import dataclasses
from typing import Any, Generic, TypeVar

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array

S = TypeVar("S")


@flax.struct.dataclass
class Traced(Generic[S]):
    """A frozen dataclass of numbers, such as an exit policy: its class is part of the program, its numbers are not."""

    kind: type[S] = flax.struct.field(pytree_node=False)
    numbers: dict[str, Array]

    @classmethod
    def of(cls, settings: Any) -> "Traced[Any]":
        """The numbers of `settings`, as int32 and float32."""
        values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return cls(kind=type(settings), numbers={name: _as_array(value) for name, value in values.items()})

    def settings(self) -> S:
        """The dataclass again, not validated a second time: inside a program its numbers have no values to check."""
        settings = object.__new__(self.kind)
        for name, number in self.numbers.items():
            object.__setattr__(settings, name, number)
        return settings


def _as_array(value: int | float) -> Array:
    return jnp.asarray(value, jnp.float32 if isinstance(value, float) else jnp.int32)
