"""Exit policies of many slots as one pytree: which classes there are is part of a program, their numbers are not."""

import dataclasses
import functools
import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from looplm_jax.errors import UserError
from looplm_jax.halting.policies import Bounded, Custom, ExitPolicy, FixedLoops, QExit, between
from looplm_jax.halting.signals import Needs, Signals

Kind = type[Any] | Custom  # the class of a policy; a Custom is a kind of its own
_DTYPES: dict[Any, Any] = {int: jnp.int32, "int": jnp.int32, float: jnp.float32, "float": jnp.float32}
_MOST_KINDS = 32
_NO_KIND = -1
_NO_CEILING = 2**31 - 1


@flax.struct.dataclass
class PolicyTable:
    """A policy for each of N slots. Without the axis N it is one policy, for any batch, with traced numbers.

    `numbers[i]` has the fields of the policies of class `kinds[i]`, which are zeros in slots of another class. Bounds
    are taken off a policy into `floor` and `ceiling`. A slot without a policy leaves at loop 1.
    """

    kinds: tuple[Kind, ...] = flax.struct.field(pytree_node=False)
    kind: Int[Array, "*N"]  # index into kinds; -1: no policy
    numbers: tuple[dict[str, Array], ...]
    floor: Int[Array, "*N"]
    ceiling: Int[Array, "*N"]

    @classmethod
    def empty(cls, slots: int, kinds: tuple[Kind, ...] = (FixedLoops, QExit)) -> "PolicyTable":
        """Slots without policies, and room for policies of these kinds."""
        return cls(
            kinds=kinds,
            kind=jnp.full(slots, _NO_KIND, jnp.int32),
            numbers=tuple(_zeros(kind, (slots,)) for kind in kinds),
            floor=jnp.ones(slots, jnp.int32),
            ceiling=jnp.ones(slots, jnp.int32),
        )

    @property
    def needs(self) -> Needs:
        """What any of the kinds reads."""
        return functools.reduce(operator.or_, (kind.needs for kind in self.kinds), Needs(0))

    def exits(self, signals: Signals) -> Bool[Array, "*N"]:
        """What the policy of each slot says, within its bounds."""
        leaves = jnp.zeros(signals.loop.shape, bool)
        for index, (kind, numbers) in enumerate(zip(self.kinds, self.numbers)):
            leaves = jnp.where(self.kind == index, _policy(kind, numbers).exits(signals), leaves)
        return between(leaves, signals.loop, self.floor, self.ceiling)

    def accepts(self, policy: ExitPolicy) -> bool:
        """Whether its kind is known, so that setting it compiles nothing."""
        return _kind(_unbounded(policy)) in self.kinds

    def with_kind(self, policy: ExitPolicy) -> "PolicyTable":
        """Room for policies of this one's kind as well; the table itself where it is known. Raises as `with_kinds`."""
        return self if self.accepts(policy) else self.with_kinds((*self.kinds, _kind(_unbounded(policy))))

    def with_kinds(self, kinds: tuple[Kind, ...]) -> "PolicyTable":
        """Room for exactly these kinds; slots of other kinds lose their policy. A program is compiled for each tuple.

        Raises:
          UserError: a class that is no frozen dataclass of numbers, or more than 32 kinds.
        """
        if len(kinds) > _MOST_KINDS:
            raise UserError(
                f"more than {_MOST_KINDS} kinds of exit policy at once; make each Custom policy once and use it again"
            )
        known = dict(zip(self.kinds, self.numbers))
        moved = [kinds.index(kind) if kind in kinds else _NO_KIND for kind in (*self.kinds, None)]
        return PolicyTable(
            kinds=kinds,
            kind=jnp.asarray(moved, jnp.int32)[self.kind],
            numbers=tuple(known[kind] if kind in known else _zeros(kind, self.kind.shape) for kind in kinds),
            floor=self.floor,
            ceiling=self.ceiling,
        )

    def row(self, policy: ExitPolicy) -> "PolicyTable":
        """One policy as a table without the axis N. Raises ValueError for a kind that is not known."""
        if not self.accepts(policy):
            raise ValueError(f"no room for policies of the kind {_kind(_unbounded(policy))}; see PolicyTable.with_kind")
        inner = _unbounded(policy)
        own = _kind(inner)
        floor = policy.min_loops if isinstance(policy, Bounded) else 1
        ceiling = _NO_CEILING if policy.max_loops is None else policy.max_loops
        return PolicyTable(
            kinds=self.kinds,
            kind=jnp.asarray(self.kinds.index(own), jnp.int32),
            numbers=tuple(_numbers(inner) if kind == own else _zeros(kind, ()) for kind in self.kinds),
            floor=jnp.asarray(floor, jnp.int32),
            ceiling=jnp.asarray(ceiling, jnp.int32),
        )

    def with_row(self, slot: int | Int[Array, ""], row: "PolicyTable") -> "PolicyTable":
        """The policy of one slot replaced. Pure; slot and row may be traced."""
        return jax.tree.map(lambda whole, own: whole.at[slot].set(own), self, row)

    def with_policy(self, slot: int, policy: ExitPolicy) -> "PolicyTable":
        """The policy of one slot replaced, by a program that is compiled once for a table's kinds and size."""
        return _with_row(self, jnp.int32(slot), self.row(policy))


_with_row = jax.jit(PolicyTable.with_row)


def _unbounded(policy: ExitPolicy) -> ExitPolicy:
    return policy.policy if isinstance(policy, Bounded) else policy


def _kind(policy: ExitPolicy) -> Kind:
    return policy if isinstance(policy, Custom) else type(policy)


def _policy(kind: Kind, numbers: dict[str, Array]) -> Any:
    """A policy of arrays, not validated: inside a program its numbers have no values to check."""
    if isinstance(kind, Custom):
        return kind
    policy = object.__new__(kind)
    for name, number in numbers.items():
        object.__setattr__(policy, name, number)
    return policy


def _numbers(policy: ExitPolicy) -> dict[str, Array]:
    return {name: jnp.asarray(getattr(policy, name), dtype) for name, dtype in _dtypes(_kind(policy)).items()}


def _zeros(kind: Kind, shape: tuple[int, ...]) -> dict[str, Array]:
    return {name: jnp.zeros(shape, dtype) for name, dtype in _dtypes(kind).items()}


def _dtypes(kind: Kind) -> dict[str, Any]:
    """The fields of a kind's policies."""
    if isinstance(kind, Custom):
        return {}
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else None
    if fields is None or any(field.type not in _DTYPES for field in fields):
        raise UserError(
            f"exit policy {kind.__name__} must be a frozen dataclass of int and float fields; or wrap it in Custom"
        )
    return {field.name: _DTYPES[field.type] for field in fields}
