"""Each exit policy, its bounds, and the messages for invalid ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.errors import UserError
from looplm_jax.halting import (
    ArgmaxStable,
    Bounded,
    Confidence,
    Custom,
    EntropyChange,
    ExitPolicy,
    FixedLoops,
    HiddenDifference,
    KLDivergence,
    Margin,
    QExit,
    RelativeHiddenDifference,
)
from looplm_jax.halting.signals import Needs, Signals

LOOPS = 8
loops = st.integers(1, LOOPS)
bounds = st.tuples(loops, st.none() | loops).filter(lambda pair: pair[1] is None or pair[0] <= pair[1])


def signals(loop, log_survival=0.0):
    return Signals(loop=jnp.array([loop]), gate_logits=jnp.zeros(1), log_survival=jnp.full(1, log_survival))


def leaving(policy):
    """Returns the loops at which a policy that reads only the loop number lets tokens leave."""
    return [loop for loop in range(1, LOOPS + 1) if policy.exits(signals(loop))[0]]


def never(t, hidden, gate, logits):
    return t < 0


@pytest.mark.parametrize(
    ("policy", "needs", "max_loops"),
    [
        (FixedLoops(loops=3), Needs(0), 3),
        (QExit(q=0.5), Needs.GATE, None),
        (HiddenDifference(threshold=0.1), Needs.HIDDEN, None),
        (RelativeHiddenDifference(threshold=0.1), Needs.HIDDEN, None),
        (KLDivergence(threshold=0.1), Needs.PREVIOUS_LOGITS, None),
        (EntropyChange(threshold=0.1), Needs.PREVIOUS_LOGITS, None),
        (ArgmaxStable(times=2), Needs.LOGITS, None),
        (Confidence(probability=0.9), Needs.LOGITS, None),
        (Margin(margin=0.5), Needs.LOGITS, None),
        (Custom(never, needs=Needs.GATE | Needs.HIDDEN), Needs.GATE | Needs.HIDDEN, None),
        (Bounded(QExit(q=0.5), max_loops=6), Needs.GATE, 6),
        (Bounded(KLDivergence(threshold=0.1), min_loops=2), Needs.PREVIOUS_LOGITS, None),
    ],
)
def test_every_policy_says_what_it_needs_and_asks_for(policy, needs, max_loops):
    assert isinstance(policy, ExitPolicy)
    assert policy.needs == needs
    assert policy.max_loops == max_loops
    assert hash(policy) == hash(policy)


def test_fixed_loops_leave_all_at_once():
    assert leaving(FixedLoops(loops=3)) == [3, 4, 5, 6, 7, 8]


@given(st.integers(1, LOOPS), bounds)
def test_bounds_win_over_the_policy(wanted, bounds):
    low, high = bounds
    policy = Bounded(FixedLoops(loops=wanted), min_loops=low, max_loops=high)
    expected = max(low, wanted if high is None else min(wanted, high))
    assert leaving(policy)[0] == expected
    assert policy.max_loops == expected


@given(st.lists(st.booleans(), min_size=LOOPS, max_size=LOOPS), bounds, bounds)
def test_bounds_of_bounds_are_the_inner_ones_within_the_outer_ones(says, inner, outer):
    def bounded(leaves, low, high):
        return [(leave and loop >= low) or loop >= (high or LOOPS + 1) for loop, leave in enumerate(leaves, start=1)]

    policy = Custom(lambda t, hidden, gate, logits: jnp.array(says)[t - 1], needs=Needs(0))
    nested = Bounded(Bounded(policy, min_loops=inner[0], max_loops=inner[1]), min_loops=outer[0], max_loops=outer[1])
    assert nested.policy is policy
    found = [bool(nested.exits(signals(loop))[0]) for loop in range(1, LOOPS + 1)]
    assert found == bounded(bounded(says, *inner), *outer)


def test_a_function_of_ones_own_sees_loop_state_gate_and_predictions():
    seen = {}

    def function(t, hidden, gate, logits):
        seen.update(t=t, hidden=hidden, gate=gate, logits=logits)
        return gate > 0

    given = Signals(
        loop=jnp.array([2, 3]),
        gate_logits=jnp.array([-1.0, 1.0]),
        log_survival=jnp.zeros(2),
        hidden=jnp.ones((2, 4)),
        logits=None,
    )
    policy = Custom(function, needs=Needs.HIDDEN)
    np.testing.assert_array_equal(policy.exits(given), [False, True])
    assert seen["t"] is given.loop
    assert seen["hidden"] is given.hidden
    assert seen["gate"] is given.gate_logits
    assert seen["logits"] is None


def test_a_signal_that_was_not_computed_is_named():
    with pytest.raises(ValueError, match="this policy reads logits, which was not computed"):
        KLDivergence(threshold=0.1).exits(signals(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedLoops(loops=0), "loops must be at least 1, not 0"),
        (lambda: FixedLoops(loops=2**31), "loops must be at most 2147483647, not 2147483648"),
        (lambda: QExit(q=1.5), "q must be in [0, 1], not 1.5"),
        (lambda: ArgmaxStable(times=0), "times must be at least 1, not 0"),
        (lambda: Confidence(probability=1.1), "probability must be in [0, 1], not 1.1"),
        (lambda: Margin(margin=-0.1), "margin must be in [0, 1], not -0.1"),
        (lambda: HiddenDifference(threshold=0.0), "the threshold of HiddenDifference must be positive, not 0.0"),
        (
            lambda: RelativeHiddenDifference(threshold=-1.0),
            "the threshold of RelativeHiddenDifference must be positive, not -1.0",
        ),
        (lambda: KLDivergence(threshold=float("nan")), "the threshold of KLDivergence must be positive, not nan"),
        (lambda: KLDivergence(threshold=float("inf")), "the threshold of KLDivergence must be positive, not inf"),
        (lambda: EntropyChange(threshold=1e-60), "the threshold of EntropyChange is beyond float32: 1e-60"),
        (lambda: Bounded(QExit(q=0.5), min_loops=0), "min_loops must be at least 1, not 0"),
        (lambda: Bounded(QExit(q=0.5), max_loops=0), "max_loops must be at least 1, not 0"),
        (
            lambda: Bounded(QExit(q=0.5), min_loops=3, max_loops=2),
            "min_loops=3 is above max_loops=2; lower it",
        ),
        (lambda: Custom(3, needs=Needs(0)), "Custom needs a function that can be hashed, not 3"),
        (
            lambda: Custom(lambda t, hidden, gate, logits: gate, needs=Needs(0)).exits(signals(1)),
            "the function of a Custom exit policy must return bool[1], one for each token, not float32[1]",
        ),
        (
            lambda: Custom(lambda t, hidden, gate, logits: True, needs=Needs(0)).exits(signals(1)),
            "the function of a Custom exit policy must return bool[1], one for each token, not bool[]",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize("loops", [1.5, "2", None, True])
def test_loops_are_whole_numbers(loops):
    with pytest.raises(UserError, match=r"^loops must be a whole number, not "):
        FixedLoops(loops=loops)
    if loops is not None:
        with pytest.raises(UserError, match=r"^max_loops must be a whole number, not "):
            Bounded(QExit(q=0.5), max_loops=loops)
