import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import GuardConfig
from looplm_jax.training.guard import initial_guard, is_sound, next_stage_guard, update_guard

CONFIG = GuardConfig(window=4, sigma=6.0)


def follow(losses, state=None, norm=1.0, config=CONFIG):
    """The verdicts on a sequence of losses, and the state after it."""
    state, verdicts = state or initial_guard(config), []
    for loss in losses:
        loss = jnp.float32(loss)
        sound = is_sound(config, state, loss, jnp.float32(norm))
        state = update_guard(state, loss, sound)
        verdicts.append(bool(sound))
    return verdicts, state


def test_a_spike_is_told_only_by_a_full_window():
    assert follow([1, 1.1, 1, 100])[0] == [True, True, True, True]
    verdicts, state = follow([1, 1.1, 1, 1.1, 100, 1.0])
    assert verdicts == [True, True, True, True, False, True]
    assert (int(state.accepted), int(state.skipped), int(state.skipped_in_a_row)) == (5, 1, 0)


def test_the_limit_is_six_standard_deviations_above_the_mean():
    losses = np.float32([1, 2, 3, 5])
    limit = losses.mean() + 6 * losses.std()
    assert follow([*losses, limit * 0.999])[0][-1]
    assert not follow([*losses, limit * 1.001])[0][-1]


def test_a_fall_is_no_spike():
    assert follow([5, 5.1, 5, 5.1, -100])[0][-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_sound(bad):
    assert follow([bad])[0] == [False]
    assert follow([1.0], norm=bad)[0] == [False]


def test_skipped_losses_do_not_enter_the_window():
    _, state = follow([1, 2, 3, 4, np.nan, 1e9, np.inf])
    np.testing.assert_array_equal(state.losses, [1, 2, 3, 4])
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 3)
    _, state = follow([2.5], state)
    np.testing.assert_array_equal(state.losses, [2.5, 2, 3, 4])
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 0)


@given(st.lists(st.one_of(st.floats(-10, 10, width=32), st.just(float("nan"))), max_size=20))
def test_counts_add_up(losses):
    verdicts, state = follow(losses)
    accepted = [loss for loss, sound in zip(losses, verdicts) if sound]
    assert int(state.accepted) == len(accepted)
    assert int(state.skipped) == len(losses) - len(accepted)
    assert int(state.skipped_in_a_row) == next((n for n, sound in enumerate(reversed(verdicts)) if sound), len(losses))
    assert sorted(state.losses.tolist()) == sorted([*np.float32(accepted[-4:]), *[0.0] * (4 - len(accepted[-4:]))])


def test_another_stage_forgets_the_losses_and_keeps_the_counts():
    _, state = follow([1, 2, 3, 4, np.nan])
    state = next_stage_guard(state)
    assert (int(state.accepted), int(state.skipped), int(state.skipped_in_a_row)) == (0, 1, 1)
    assert follow([1000.0], state)[0] == [True]
