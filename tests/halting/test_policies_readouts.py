"""Policies on states and predictions equal their definitions, and leave at the expected loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from trajectories import (
    KINDS,
    LOOPS,
    ROWS,
    VOCABULARY,
    Trajectory,
    evidence,
    fraction,
    jitted_exit_loops,
    policies,
    row,
    small,
    trajectories,
)

from looplm_jax.halting import (
    ArgmaxStable,
    Bounded,
    Confidence,
    CosineChange,
    Custom,
    EntropyChange,
    FixedLoops,
    HiddenDifference,
    KLDivergence,
    Margin,
    MinPDivergence,
    QExit,
    RelativeHiddenDifference,
    RelativeStateDifference,
    exit_distribution,
    exit_loops,
    q_exit,
)
from looplm_jax.halting.signals import LoopMemory, Needs

CHANGES = [
    HiddenDifference,
    RelativeHiddenDifference,
    RelativeStateDifference,
    CosineChange,
    KLDivergence,
    MinPDivergence,
    EntropyChange,
]


def first(leaves):
    leaves[-1] = True
    return np.argmax(leaves, axis=0) + 1


@given(trajectories(), st.sampled_from(CHANGES), small)
def test_small_changes_are_those_of_the_definition(trajectory, kind, threshold):
    policy = kind(threshold=threshold)
    found = evidence(trajectory, policy)
    assume((np.abs(found[1:] - threshold) > 1e-4 * threshold + 1e-6).all())  # ties depend on rounding
    np.testing.assert_array_equal(trajectory.exits(row(policy)), first(found < threshold))


@given(trajectories(), fraction, st.booleans())
def test_confidence_and_margin_are_those_of_the_definition(trajectory, number, margin):
    policy = Margin(margin=number) if margin else Confidence(probability=number)
    found = evidence(trajectory, policy)
    assume((np.abs(found - number) > 1e-5).all())
    np.testing.assert_array_equal(trajectory.exits(row(policy)), first(found >= number))


@given(trajectories(), st.integers(1, LOOPS))
def test_a_prediction_is_stable_after_so_many_loops_in_a_row(trajectory, times):
    best = trajectory.logits.argmax(axis=-1)
    leaves = np.array(
        [[loop >= times and len({*row[loop - times : loop + 1]}) == 1 for row in best.T] for loop in range(LOOPS)]
    )
    np.testing.assert_array_equal(trajectory.exits(row(ArgmaxStable(times=times))), first(leaves))


@given(trajectories(), fraction)
def test_q_exit_is_that_of_the_distribution(trajectory, q):
    pdf = np.asarray(exit_distribution(jnp.asarray(trajectory.gates)), np.float64)
    cdf = np.cumsum(pdf, axis=0)
    assume(np.abs(cdf[:-1] - q).min() > 1e-5)
    np.testing.assert_array_equal(trajectory.exits(row(QExit(q=q))), q_exit(jnp.asarray(pdf, jnp.float32), q))


@pytest.mark.parametrize("logit", [-80.0, 80.0, -1e30, 1e30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saturated_gates_leave_by_q(logit, dtype):
    gates, states = jnp.full((LOOPS, 2), logit, dtype), jnp.zeros((LOOPS, 2, 3), dtype)
    assert (exit_loops(QExit(q=1.0), states, gates, states) == LOOPS).all()
    assert (exit_loops(QExit(q=0.0), states, gates, states) == 1).all()
    assert (exit_loops(QExit(q=0.5), states, gates, states) == (1 if logit > 0 else LOOPS)).all()


@given(trajectories(), st.sampled_from(CHANGES), small, small)
def test_a_larger_threshold_never_leaves_later(trajectory, kind, one, other):
    low, high = sorted((one, other))
    assert (trajectory.exits(row(kind(threshold=high))) <= trajectory.exits(row(kind(threshold=low)))).all()


@given(trajectories(), st.sampled_from([QExit, Confidence, Margin]), fraction, fraction)
def test_asking_for_more_never_leaves_earlier(trajectory, kind, one, other):
    (name,) = (field.name for field in dataclasses.fields(kind))
    low, high = (trajectory.exits(row(kind(**{name: number}))) for number in sorted((one, other)))
    assert (low <= high).all()


@given(trajectories(), policies)
def test_every_token_leaves_within_the_loops(trajectory, policy):
    exits = trajectory.exits(row(policy))
    assert exits.dtype == np.int32
    assert (exits >= 1).all()
    assert (exits <= LOOPS).all()


@given(trajectories(), policies, st.integers(1, LOOPS), st.integers(1, LOOPS))
def test_every_token_leaves_within_its_bounds(trajectory, policy, one, other):
    low, high = sorted((one, other))
    exits = trajectory.exits(row(Bounded(policy, min_loops=low, max_loops=high)))
    assert (exits >= low).all()
    assert (exits <= high).all()


@given(trajectories(), st.sampled_from(CHANGES), small)
def test_identical_states_in_a_row_leave_at_once(trajectory, kind, threshold):
    still = Trajectory(
        *(
            np.broadcast_to(x[:1], x.shape)
            for x in (trajectory.hidden, trajectory.gates, trajectory.logits, trajectory.states)
        )
    )
    assert (still.exits(row(kind(threshold=threshold))) == 2).all()
    assert (still.exits(row(ArgmaxStable(times=3))) == 4).all()


def test_states_of_nothing_but_zeros_leave_at_once():
    zeros = Trajectory(
        np.zeros((LOOPS, ROWS, 3), np.float32),
        np.zeros((LOOPS, ROWS), np.float32),
        np.zeros((LOOPS, ROWS, VOCABULARY), np.float32),
        np.zeros((LOOPS, ROWS, 3), np.float32),
    )
    for kind in (RelativeHiddenDifference, RelativeStateDifference, CosineChange):
        assert (zeros.exits(row(kind(threshold=1e-6))) == 2).all()


def test_tokens_that_cannot_be_do_not_disturb_divergence_and_entropy():
    logits = np.zeros((LOOPS, ROWS, VOCABULARY), np.float32)
    logits[..., 0] = -np.inf
    logits[2:, :, 1] = 0.5
    still = np.zeros((LOOPS, ROWS, 3), np.float32)
    trajectory = Trajectory(still, np.zeros((LOOPS, ROWS), np.float32), logits, still)
    for kind in (KLDivergence, EntropyChange):
        assert (trajectory.exits(row(kind(threshold=1e-4))) == 2).all()
    logits[1, :, 0] = 0.0  # possible at one loop only: an infinite divergence, and two changes of entropy
    for kind in (KLDivergence, EntropyChange):
        assert (trajectory.exits(row(kind(threshold=1e-4))) == 4).all()


def test_states_of_bfloat16_are_compared_in_float32():
    states = jnp.stack([jnp.full((2, 64), 1 + step, jnp.bfloat16) for step in (0.0, 2**-7, 2**-7)])
    gates = jnp.zeros((3, 2), jnp.bfloat16)
    assert (exit_loops(HiddenDifference(threshold=0.0626), states, gates, states) == 2).all()
    assert (exit_loops(HiddenDifference(threshold=0.0624), states, gates, states) == 3).all()


@pytest.mark.parametrize("policy", [FixedLoops(loops=2), QExit(q=0.5), HiddenDifference(threshold=0.1)])
def test_no_prediction_is_made_for_policies_that_read_none(policy):
    def head(state):
        raise AssertionError("called")

    exit_loops(policy, jnp.zeros((LOOPS, 2, 3)), jnp.zeros((LOOPS, 2)), head)


@given(trajectories(), policies)
def test_a_head_and_its_predictions_say_the_same(trajectory, policy):
    head = np.arange(18, dtype=np.float32).reshape(3, 6) % 5
    logits = jnp.einsum("tbd,dv->tbv", trajectory.hidden, head)
    by_head = exit_loops_with_head(row(policy), trajectory.hidden, trajectory.gates, head, trajectory.states)
    by_logits = dataclasses.replace(trajectory, logits=logits).exits(row(policy))
    np.testing.assert_array_equal(by_head, by_logits)


@jax.jit
def exit_loops_with_head(policy, hidden, gates, head, states):
    return exit_loops(policy, hidden, gates, lambda state: state @ head, states=states)


@pytest.mark.parametrize(
    ("needs", "kept"),
    [
        (Needs.GATE, set()),
        (Needs.HIDDEN, {"hidden", "previous_hidden"}),
        (Needs.STATE, {"state", "previous_state"}),
        (Needs.LOGITS, {"logits", "prediction", "unchanged"}),
        (Needs.PREVIOUS_LOGITS, {"logits", "previous_logits", "prediction", "unchanged"}),
    ],
)
def test_only_what_is_needed_is_kept(needs, kept):
    hidden, logits = jnp.zeros((2, 3)), jnp.zeros((2, 6), jnp.bfloat16)
    memory = LoopMemory.before_loops(needs, jax.eval_shape(lambda: hidden), jax.eval_shape(lambda: logits))
    signals = memory.observe(jnp.zeros(2), hidden, logits, state=hidden)
    optional = {
        "state",
        "previous_state",
        "hidden",
        "previous_hidden",
        "logits",
        "previous_logits",
        "prediction",
        "unchanged",
    }
    assert {name for name in optional if getattr(signals, name) is not None} == kept
    assert jax.tree.structure(signals.memory()) == jax.tree.structure(memory)
    assert [leaf.dtype for leaf in jax.tree.leaves(signals.memory())] == [
        leaf.dtype for leaf in jax.tree.leaves(memory)
    ]


def test_any_batch_axes_do():
    random = np.random.default_rng(0)
    hidden, gates = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((LOOPS, 2, 3, 4), (LOOPS, 2, 3)))
    flat_hidden, flat_gates = hidden.reshape(LOOPS, 6, 4), gates.reshape(LOOPS, 6)
    for kind in KINDS:
        # The options of a rule, such as the direction of a divergence, keep their defaults.
        (field,) = (field for field in dataclasses.fields(kind) if field.type is not bool)
        policy = row(kind(**{field.name: 1 if field.type is int else 0.5}))
        exits = jitted_exit_loops(policy, hidden, gates, hidden, states=hidden)
        flat = jitted_exit_loops(policy, flat_hidden, flat_gates, flat_hidden, states=flat_hidden)
        np.testing.assert_array_equal(exits.reshape(-1), flat)


def test_a_function_of_ones_own_chooses_the_loop():
    policy = Custom(lambda t, hidden, gate, logits: (t >= 3) & (hidden[..., 0] > 0), needs=Needs.HIDDEN)
    hidden = jnp.stack([jnp.ones((LOOPS, 3)), -jnp.ones((LOOPS, 3))], axis=1)
    np.testing.assert_array_equal(exit_loops(policy, hidden, jnp.zeros((LOOPS, 2)), hidden), [3, LOOPS])
