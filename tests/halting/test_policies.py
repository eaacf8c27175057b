"""Exit policies, and the messages for what cannot be one."""

import jax.numpy as jnp
import pytest

from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops, QExit, parse_exit_policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("loops=4", FixedLoops(loops=4)),
        ("q=0.5", QExit(q=0.5)),
        ("q=0", QExit(q=0.0)),
        ("q=1", QExit(q=1.0)),
    ],
)
def test_policies_are_read_as_typed(text, policy):
    assert parse_exit_policy(text) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loops=0", "loops must be at least 1, not 0"),
        ("loops=2.5", "exit policy 'loops=2.5': '2.5' is not a number; write loops=4 or q=0.5"),
        ("loops", "exit policy 'loops': '' is not a number; write loops=4 or q=0.5"),
        ("q=half", "exit policy 'q=half': 'half' is not a number; write loops=4 or q=0.5"),
        ("q=1.5", "q must be in [0, 1], not 1.5"),
        ("q=-0.1", "q must be in [0, 1], not -0.1"),
        ("q=nan", "q must be in [0, 1], not nan"),
        ("loop=4", "unknown exit policy 'loop=4'; write loops=4 or q=0.5; did you mean 'loops'?"),
        ("", "unknown exit policy ''; write loops=4 or q=0.5; known: loops, q"),
    ],
)
def test_anything_else_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as error:
        parse_exit_policy(text)
    assert str(error.value) == message


def test_fixed_loops_leave_all_at_once():
    policy, survival = FixedLoops(loops=3), jnp.zeros((2, 2))
    assert [bool(policy.exits(survival, loop).all()) for loop in (1, 2, 3, 4)] == [False, False, True, True]
    assert policy.max_loops == 3


def test_q_exit_leaves_the_number_of_loops_to_the_model():
    assert QExit(q=0.5).max_loops is None
