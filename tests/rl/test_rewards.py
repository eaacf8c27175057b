"""Rewards, and what is said of functions that are none."""

import pytest

from looplm_jax.config import Reward
from looplm_jax.errors import UserError
from looplm_jax.rl import REWARDS, boxed, exact, number
from looplm_jax.rl._rewards import judge


def test_every_reward_has_a_name():
    assert {Reward.EXACT: exact, Reward.NUMBER: number, Reward.BOXED: boxed} == REWARDS


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [("1 3 0", "1 3 0", 1), (" 1 3 0\n", "1 3 0", 1), ("1 3", "1 3 0", 0), ("1  3 0", "1 3 0", 0), ("", "0", 0)],
)
def test_exact(text, answer, right):
    assert exact("", text, answer) == right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("2 + 3 = 5", "5", 1),
        ("the total is $1,234.50.", "#### 1234.5", 1),
        ("5-3", "3", 1),  # a minus between numbers is no sign
        ("it is -3", "-3", 1),
        ("it is -3", "3", 0),
        ("1,2", "2", 1),  # a list, not a number with groups
        ("007", "7", 1),
        ("no idea", "7", 0),
        ("7 and then 8", "7", 0),
        ("9" * 5000, "9" * 5000, 1),
    ],
)
def test_number(text, answer, right):
    assert number("", text, answer) == right


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", 1),
        (r"\boxed{1} or \boxed{2}", "2", 1),
        (r"\boxed{1} or \boxed{2}", "1", 0),
        (r"\boxed{ \left( 3.50, 2 \right) }", r"hence \boxed{(3.5,2)}", 1),
        (r"\boxed{3.0}", "3", 1),
        (r"\boxed{30}", "3", 0),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", 1),
        (r"\boxed{4} and \boxed{5", "4", 1),  # cut inside the last box
        ("4", "4", 0),
    ],
)
def test_boxed(text, answer, right):
    assert boxed("", text, answer) == right


def fails(*_):
    raise KeyError("no\nkey")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (fails, "problem 7: the reward raised KeyError: 'no\\nkey'"),
        (lambda *_: float("nan"), "problem 7: a reward must be a finite number, not nan"),
        (lambda *_: "right", "problem 7: a reward must be a finite number, not 'right'"),
        (number, "problem 7: the answer 'x' holds no number; use another reward"),
    ],
)
def test_a_reward_that_is_none_is_named(reward, message):
    with pytest.raises(UserError) as raised:
        judge(reward, "", "5", "x", where="problem 7")
    assert str(raised.value) == message
    assert judge(lambda *_: 1, "", "", "", where="") == 1.0
