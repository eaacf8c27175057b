"""Exit policies of many slots as one pytree, and the exit loops of tokens for which all loops were computed.

The classes of the policies are part of a compiled program; their numbers are arrays. A slot can therefore be given
another policy of a known class without compilation.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.errors import UserError
from looplm_jax.halting._policies import Bounded, Custom, ExitPolicy, FixedLoops, QExit, between
from looplm_jax.halting.signals import LoopMemory, Needs, Signals

Kind = type[Any] | Custom  # the class of a policy; each Custom policy is a separate kind
Head = Callable[[Array], Array]  # states [*B, D] of one loop to logits [*B, V]
_DTYPES: dict[Any, Any] = {
    **{int: jnp.int32, "int": jnp.int32},
    **{float: jnp.float32, "float": jnp.float32},
    **{bool: jnp.bool_, "bool": jnp.bool_},
}
_MOST_KINDS = 32  # every kind of a table is evaluated in every tick
_NO_KIND = -1
_NO_CEILING = 2**31 - 1  # the largest int32


@flax.struct.dataclass
class PolicyTable:
    """A policy for each of N slots. Without the axis N, one policy with traced numbers, for any batch.

    Bounds are stored in `floor` and `ceiling`, separately from the policy. A slot without a policy exits at loop 1.

    Attributes:
      kinds: the classes of the policies in the table.
      kind: the class of each slot as an index into `kinds`, or -1 for no policy.
      numbers: for each class, the fields of its policies by name. They are zero in slots of another class.
      floor: the smallest exit loop of each slot.
      ceiling: the largest exit loop of each slot.
    """

    kinds: tuple[Kind, ...] = flax.struct.field(pytree_node=False)
    kind: Int[Array, "*N"]
    numbers: tuple[dict[str, Array], ...]
    floor: Int[Array, "*N"]
    ceiling: Int[Array, "*N"]

    @classmethod
    def empty(cls, slots: int, kinds: tuple[Kind, ...] = (FixedLoops, QExit)) -> "PolicyTable":
        """Returns a table of slots without policies, with room for policies of these kinds."""
        return cls(
            kinds=kinds,
            kind=jnp.full(slots, _NO_KIND, jnp.int32),
            numbers=tuple(_zeros(kind, (slots,)) for kind in kinds),
            floor=jnp.ones(slots, jnp.int32),
            ceiling=jnp.ones(slots, jnp.int32),
        )

    @property
    def needs(self) -> Needs:
        """The needs of all kinds together."""
        return functools.reduce(operator.or_, (kind.needs for kind in self.kinds), Needs(0))

    def exits(self, signals: Signals) -> Bool[Array, "*N"]:
        """Returns whether each slot exits by its policy, within its bounds."""
        # Every kind is evaluated for all slots, because a program cannot branch per slot.
        leaves = jnp.zeros(signals.loop.shape, bool)
        for index, (kind, numbers) in enumerate(zip(self.kinds, self.numbers)):
            # In slots of another kind the policy has zeros for numbers, and its result is discarded.
            leaves = jnp.where(self.kind == index, _policy(kind, numbers).exits(signals), leaves)

        return between(leaves, signals.loop, self.floor, self.ceiling)

    def accepts(self, policy: ExitPolicy) -> bool:
        """Whether the policy's kind is in the table, so that setting it needs no compilation."""
        return _kind(_unbounded(policy)) in self.kinds

    def with_kind(self, policy: ExitPolicy) -> "PolicyTable":
        """Returns a table with room for policies of this policy's kind: the table itself if it has room.

        Raises the errors of `with_kinds`.
        """
        return self if self.accepts(policy) else self.with_kinds((*self.kinds, _kind(_unbounded(policy))))

    def with_kinds(self, kinds: tuple[Kind, ...]) -> "PolicyTable":
        """Returns a table with room for exactly these kinds. Slots of other kinds lose their policy.

        A program is compiled for each tuple of kinds.

        Raises:
          UserError: a class is not a frozen dataclass of numbers, or there are more than 32 kinds.
        """
        if len(kinds) > _MOST_KINDS:
            raise UserError(
                f"more than {_MOST_KINDS} kinds of exit policy at once; make each Custom policy once and use it again"
            )

        known = dict(zip(self.kinds, self.numbers))
        # Maps old indices to new ones. The final None maps -1 to itself, because index -1 selects the last entry.
        moved = [kinds.index(kind) if kind in kinds else _NO_KIND for kind in (*self.kinds, None)]

        return PolicyTable(
            kinds=kinds,
            kind=jnp.asarray(moved, jnp.int32)[self.kind],
            numbers=tuple(known[kind] if kind in known else _zeros(kind, self.kind.shape) for kind in kinds),
            floor=self.floor,
            ceiling=self.ceiling,
        )

    def row(self, policy: ExitPolicy) -> "PolicyTable":
        """Returns one policy as a table without the axis N, of NumPy numbers, which the caller transfers.

        Raises:
          ValueError: its kind is not in the table.
        """
        if not self.accepts(policy):
            raise ValueError(f"no room for policies of the kind {_kind(_unbounded(policy))}; see PolicyTable.with_kind")

        inner = _unbounded(policy)
        own = _kind(inner)

        floor = policy.min_loops if isinstance(policy, Bounded) else 1
        ceiling = _NO_CEILING if policy.max_loops is None else policy.max_loops

        host: dict[str, Any] = {
            "kind": np.int32(self.kinds.index(own)),
            "numbers": tuple(_numbers(inner) if kind == own else _no_numbers(kind) for kind in self.kinds),
            "floor": np.int32(floor),
            "ceiling": np.int32(ceiling),
        }
        return PolicyTable(kinds=self.kinds, **host)

    def with_row(self, slot: int | Int[Array, ""], row: "PolicyTable") -> "PolicyTable":
        """Returns a table with the policy of one slot replaced. Pure; slot and row may be tracers."""
        return jax.tree.map(lambda whole, own: whole.at[slot].set(own), self, row)

    def with_policy(self, slot: int, policy: ExitPolicy) -> "PolicyTable":
        """Returns a table with the policy of one slot replaced.

        The program that replaces it is compiled once for a table's kinds and size.
        """
        return _with_row(self, jnp.int32(slot), self.row(policy))


# Compiled, because otherwise each array of the table would be updated by a dispatch of its own.
_with_row = jax.jit(PolicyTable.with_row)


# Exits of tokens for which all loops were computed, as for prompts and in evaluation


def exit_loops(
    policy: ExitPolicy | PolicyTable,
    hidden: Float[Array, "T *B D"],
    gate_logits: Float[Array, "T *B"],
    logits: Head | Float[Array, "T *B V"],
    draws: Float[Array, "*B"] | None = None,
    states: Float[Array, "T *B D"] | None = None,
) -> Int[Array, "*B"]:
    """Returns the loop at which each token exits, in 1..T. Tokens that have not exited earlier exit at T.

    Args:
      policy: a policy for all tokens, or a table with one per token.
      hidden: the states of every loop, as the head reads them.
      gate_logits: the exit gates of every loop.
      logits: the predictions of every loop, or a head that computes those of one loop, `[*B, D]` to `[*B, V]`. The head
        is called only for policies that read predictions, and for one loop at a time.
      draws: a number per token, uniform in [0, 1), for policies that are random.
      states: the states of every loop before coda and readout norm, for policies that read them.

    Raises:
      UserError: the policy is random, and there are no draws; or it reads states before the coda, which are missing.
    """
    if Needs.DRAW in policy.needs and draws is None:
        raise UserError("this exit policy is random: choose another one, or give exit_loops a draw for each token")

    if Needs.STATE in policy.needs and states is None:
        raise UserError("this exit policy reads states before the coda: choose another one, or give exit_loops states")

    def predict(loop: Int[Array, ""]) -> Float[Array, "*B V"] | None:
        if Needs.LOGITS not in policy.needs:
            return None
        return logits(hidden[loop]) if callable(logits) else logits[loop]

    def after_loop(memory: LoopMemory, loop: Int[Array, ""]) -> tuple[LoopMemory, Array]:
        # One loop after another, as in a tick of the engine.
        signals = memory.observe(
            gate_logits[loop], hidden[loop], predict(loop), draws, None if states is None else states[loop]
        )
        return signals.memory(), policy.exits(signals)

    loops = jnp.arange(hidden.shape[0])
    # The memory needs the shapes of the states and predictions of one loop; nothing is computed here.
    of_one_loop = jax.eval_shape(lambda loop: (hidden[loop], predict(loop)), loops[0])
    _, leaves = jax.lax.scan(after_loop, LoopMemory.before_loops(policy.needs, *of_one_loop), loops)

    # The first True along the loops. The last loop is always True, so there is one.
    return jnp.argmax(leaves.at[-1].set(True), axis=0).astype(jnp.int32) + 1


# Policies as arrays


def _unbounded(policy: ExitPolicy) -> ExitPolicy:
    """Returns the policy inside bounds."""
    return policy.policy if isinstance(policy, Bounded) else policy


def _kind(policy: ExitPolicy) -> Kind:
    """Returns the kind of a policy without bounds."""
    return policy if isinstance(policy, Custom) else type(policy)


def _policy(kind: Kind, numbers: dict[str, Array]) -> Any:
    """Returns a policy whose fields are arrays.

    Its `__post_init__` is not called, because traced numbers have no values to validate.
    """
    if isinstance(kind, Custom):
        return kind
    policy = object.__new__(kind)
    for name, number in numbers.items():
        object.__setattr__(policy, name, number)
    return policy


def _numbers(policy: ExitPolicy) -> dict[str, np.ndarray]:
    """Returns the fields of a policy as arrays."""
    return {name: np.asarray(getattr(policy, name), dtype) for name, dtype in _dtypes(_kind(policy)).items()}


def _no_numbers(kind: Kind) -> dict[str, np.ndarray]:
    """Returns zeros for the fields of a kind that one policy does not have."""
    return {name: np.zeros((), dtype) for name, dtype in _dtypes(kind).items()}


def _zeros(kind: Kind, shape: tuple[int, ...]) -> dict[str, Array]:
    """Returns zeros for the fields of a kind's policies."""
    return {name: jnp.zeros(shape, dtype) for name, dtype in _dtypes(kind).items()}


def _dtypes(kind: Kind) -> dict[str, Any]:
    """Returns the dtypes of the fields of a kind's policies. Raises UserError if one is not a number."""
    if isinstance(kind, Custom):
        return {}
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else None
    if fields is None or any(field.type not in _DTYPES for field in fields):
        raise UserError(
            f"exit policy {kind.__name__} must be a frozen dataclass of int, float and bool fields; "
            "or wrap it in Custom"
        )
    return {field.name: _DTYPES[field.type] for field in fields}
