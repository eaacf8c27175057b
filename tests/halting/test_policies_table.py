"""A policy table decides as each policy alone, and other numbers compile nothing."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trajectories import KINDS, LOOPS, ROWS, exits_step_by_step, policies, trajectories

from looplm_jax.errors import UserError
from looplm_jax.halting import Bounded, Confidence, Custom, FixedLoops, HiddenDifference, KLDivergence, QExit
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.halting.signals import Needs, Signals

bounded = st.tuples(policies, st.integers(1, LOOPS), st.integers(1, LOOPS)).map(
    lambda drawn: Bounded(drawn[0], min_loops=min(drawn[1:]), max_loops=max(drawn[1:]))
)
one_for_each_row = st.lists(policies | bounded, min_size=ROWS, max_size=ROWS)


def open_gate(t, hidden, gate, logits):
    return gate > 0


def table_of(given, kinds=KINDS):
    table = PolicyTable.empty(len(given), kinds)
    for slot, policy in enumerate(given):
        table = table.with_policy(slot, policy)
    return table


@given(trajectories(), one_for_each_row)
def test_each_slot_leaves_as_its_policy_says_alone(trajectory, given):
    together = trajectory.exits(table_of(given))
    alone = [exits_step_by_step(policy, trajectory)[slot] for slot, policy in enumerate(given)]
    np.testing.assert_array_equal(together, alone)


@given(trajectories(), one_for_each_row, one_for_each_row)
def test_a_slot_keeps_nothing_of_the_policy_before(trajectory, before, after):
    table = table_of(before)
    for slot, policy in enumerate(after):
        table = table.with_policy(slot, policy)
    np.testing.assert_array_equal(trajectory.exits(table), trajectory.exits(table_of(after)))


@given(trajectories(), policies | bounded)
def test_a_row_is_one_policy_for_all(trajectory, policy):
    row = PolicyTable.empty(7, KINDS).row(policy)
    np.testing.assert_array_equal(trajectory.exits(row), trajectory.exits(table_of([policy] * ROWS)))


@given(trajectories())
def test_slots_without_a_policy_leave_at_once(trajectory):
    assert (trajectory.exits(PolicyTable.empty(ROWS, KINDS)) == 1).all()
    assert (trajectory.exits(PolicyTable.empty(ROWS, ())) == 1).all()


@given(trajectories(), st.permutations(KINDS), one_for_each_row)
def test_the_order_of_kinds_does_not_matter(trajectory, kinds, given):
    table = table_of(given)
    moved = table.with_kinds(tuple(kinds))
    signals = signals_at(3, trajectory)
    np.testing.assert_array_equal(table.exits(signals), moved.exits(signals))


def signals_at(loop, trajectory):
    return Signals(
        loop=jnp.full(ROWS, loop),
        gate_logits=jnp.asarray(trajectory.gates[loop - 1]),
        log_survival=jnp.sum(jax.nn.log_sigmoid(-jnp.asarray(trajectory.gates[:loop])), axis=0),
        hidden=jnp.asarray(trajectory.hidden[loop - 1]),
        previous_hidden=jnp.asarray(trajectory.hidden[loop - 2]),
        state=jnp.asarray(trajectory.states[loop - 1]),
        previous_state=jnp.asarray(trajectory.states[loop - 2]),
        logits=jnp.asarray(trajectory.logits[loop - 1]),
        previous_logits=jnp.asarray(trajectory.logits[loop - 2]),
        unchanged=jnp.ones(ROWS, jnp.int32),
    )


def gate_signals(slots):
    return Signals(loop=jnp.full(slots, 2), gate_logits=jnp.ones(slots), log_survival=jnp.full(slots, -1.0))


def test_other_numbers_slots_and_bounds_compile_nothing():
    traces = []

    @jax.jit
    def tick(table, signals):
        traces.append("tick")
        return table.exits(signals)

    @jax.jit
    def insert(table, row, slot):
        traces.append("insert")
        return table.with_row(slot, row)

    table = PolicyTable.empty(6)
    given = [QExit(q=0.1), QExit(q=0.9), FixedLoops(loops=2), Bounded(QExit(q=0.1), min_loops=3), FixedLoops(loops=9)]
    for slot, policy in enumerate(given):
        table = insert(table, table.row(policy), slot)
        tick(table, gate_signals(6))
    assert sorted(traces) == ["insert", "tick"]
    np.testing.assert_array_equal(tick(table, gate_signals(6)), [True, False, True, False, False, True])


def test_another_kind_compiles_once_more():
    traces = []

    @jax.jit
    def tick(table, signals):
        traces.append(len(table.kinds))
        return table.exits(signals)

    table, custom = PolicyTable.empty(2), Custom(open_gate, needs=Needs.GATE)
    tick(table, gate_signals(2))
    assert not table.accepts(custom)
    table = table.with_policy(0, FixedLoops(loops=3)).with_kind(custom)
    assert table.accepts(Bounded(custom, max_loops=3))
    assert table.with_kind(Custom(open_gate, needs=Needs.GATE)) is table
    for slot in (1, 0, 1):
        table = table.with_policy(slot, custom)
        tick(table, gate_signals(2))
    assert traces == [2, 3]
    assert tick(table, gate_signals(2)).all()


def test_setting_a_policy_is_compiled_once_for_a_table():
    table = PolicyTable.empty(5)
    table.with_policy(0, QExit(q=0.5))
    with jax.no_tracing():
        table = table.with_policy(4, FixedLoops(loops=2)).with_policy(2, Bounded(QExit(q=0.2), max_loops=4))
    np.testing.assert_array_equal(table.kind, [-1, -1, 1, -1, 0])


def test_needs_are_those_of_the_kinds():
    table = PolicyTable.empty(2)
    assert table.needs == Needs.GATE
    wider = table.with_kind(HiddenDifference(threshold=0.1)).with_kind(KLDivergence(threshold=0.1))
    assert wider.needs == Needs.GATE | Needs.HIDDEN | Needs.LOGITS | Needs.PREVIOUS_LOGITS
    assert Needs.PREVIOUS_LOGITS not in table.with_kind(Confidence(probability=0.5)).needs
    assert wider.with_kinds((FixedLoops,)).needs == Needs(0)
    assert PolicyTable.empty(2, ()).needs == Needs(0)


def test_slots_of_a_kind_that_goes_lose_their_policy():
    table = PolicyTable.empty(2).with_policy(0, FixedLoops(loops=1)).with_policy(1, QExit(q=0.0))
    fewer = table.with_kinds((QExit,))
    np.testing.assert_array_equal(fewer.kind, [-1, 0])
    np.testing.assert_array_equal(fewer.numbers[0]["q"], table.numbers[1]["q"])


@dataclasses.dataclass(frozen=True)
class EveryOther:
    """A policy of a user-defined class."""

    period: int
    phase: float
    needs: ClassVar[Needs] = Needs(0)
    max_loops: ClassVar[None] = None

    def exits(self, signals):
        return (signals.loop + jnp.asarray(self.phase, jnp.int32)) % self.period == 0


def test_a_class_of_ones_own_is_a_kind_like_others():
    table = PolicyTable.empty(2, ()).with_kind(EveryOther(period=2, phase=0.0))
    table = table.with_policy(0, EveryOther(period=2, phase=0.0)).with_policy(1, EveryOther(period=2, phase=1.0))
    np.testing.assert_array_equal(table.exits(gate_signals(2)), [True, False])


@dataclasses.dataclass(frozen=True)
class ByName:
    name: str
    needs: ClassVar[Needs] = Needs(0)
    max_loops: ClassVar[None] = None

    def exits(self, signals):
        return signals.loop > 0


def test_a_class_that_is_not_made_of_numbers_is_refused():
    message = "exit policy ByName must be a frozen dataclass of int, float and bool fields; or wrap it in Custom"
    with pytest.raises(UserError) as error:
        PolicyTable.empty(2).with_kind(ByName(name="x"))
    assert str(error.value) == message


def test_kinds_do_not_grow_without_bound():
    table = PolicyTable.empty(2)
    message = "more than 32 kinds of exit policy at once; make each Custom policy once and use it again"
    ones_own = (Custom(lambda t, hidden, gate, logits: t > 1, needs=Needs(0)) for _ in range(30))
    table = table.with_kinds((*table.kinds, *ones_own))
    with pytest.raises(UserError) as error:
        table.with_kind(Custom(open_gate, needs=Needs(0)))
    assert str(error.value) == message


def test_a_policy_of_no_known_kind_is_not_set():
    with pytest.raises(ValueError, match="no room for policies of the kind"):
        PolicyTable.empty(2).with_policy(0, HiddenDifference(threshold=0.1))
