import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import GuardConfig
from looplm_jax.training._guard import initial_guard, is_accepted, next_stage_guard, spike_limit, update_guard

CONFIG = GuardConfig(window=4, sigma=6.0)


@jax.jit
def after_one(state, loss, norm):
    accepted = is_accepted(CONFIG, state, loss, norm)
    return accepted, update_guard(state, loss, accepted)


def follow(losses, state=None, norm=1.0):
    """Returns the decisions about a sequence of losses, and the state of the guard after it."""
    state, verdicts = state or initial_guard(CONFIG), []
    for loss in losses:
        accepted, state = after_one(state, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(bool(accepted))
    return verdicts, state


def test_a_spike_is_told_only_by_a_full_window():
    assert follow([1, 1.1, 1, 100])[0] == [True, True, True, True]
    verdicts, state = follow([1, 1.1, 1, 1.1, 100, 1.0])
    assert verdicts == [True, True, True, True, False, True]
    assert (int(state.accepted), int(state.skipped), int(state.skipped_in_a_row)) == (6, 1, 0)


@pytest.mark.parametrize(("window", "aside"), [(2, 0), (4, 1), (64, 1), (65, 2), (128, 2)])
def test_the_limit_is_six_standard_deviations_above_the_mean_of_all_but_the_highest(window, aside):
    losses = np.random.default_rng(window).normal(3, 1, window).astype(np.float32)
    usual = np.sort(losses)[: window - aside].astype(np.float64)
    wanted = usual.mean() + max(6 * usual.std(), 2 * (usual.max() - usual.mean()))
    np.testing.assert_allclose(spike_limit(CONFIG, jnp.asarray(losses)), wanted, rtol=1e-5)


def test_a_loss_is_accepted_up_to_the_limit():
    losses = np.float32([1, 2, 3, 5])
    limit = float(spike_limit(CONFIG, jnp.asarray(losses)))
    assert follow([*losses, limit * 0.999])[0][-1]
    assert not follow([*losses, limit * 1.001])[0][-1]


def test_a_fall_is_no_spike():
    assert follow([5, 5.1, 5, 5.1, -100])[0][-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_sound(bad):
    assert follow([bad])[0] == [False]
    assert follow([1.0], norm=bad)[0] == [False]


def test_of_skipped_losses_the_first_of_a_row_enters_the_window():
    _, state = follow([1, 2, 3, 4, 1e9, 1e9, np.inf])
    np.testing.assert_array_equal(state.losses, [1e9, 2, 3, 4])
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 3)
    _, state = follow([2.5], state)
    np.testing.assert_array_equal(state.losses, [1e9, 2.5, 3, 4])
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 0)


def test_what_is_not_finite_never_enters_the_window():
    _, state = follow([1, 2, 3, 4, np.nan, np.inf, 1e9])
    np.testing.assert_array_equal(state.losses, [1, 2, 3, 4])
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (3, 3)


@given(st.lists(st.one_of(st.floats(-10, 10, width=32), st.just(float("nan"))), max_size=20))
def test_counts_add_up(losses):
    verdicts, state = follow(losses)
    before = [True, *verdicts]
    learned = [
        loss for loss, accepted, last in zip(losses, verdicts, before) if np.isfinite(loss) and (accepted or last)
    ]
    assert int(state.accepted) == len(learned)
    assert int(state.skipped) == verdicts.count(False)
    assert int(state.skipped_in_a_row) == next(
        (n for n, accepted in enumerate(reversed(verdicts)) if accepted), len(losses)
    )
    assert sorted(state.losses.tolist()) == sorted([*np.float32(learned[-4:]), *[0.0] * (4 - len(learned[-4:]))])


@functools.cache
def many_steps(window):
    config = GuardConfig(window=window)

    def step(state, loss):
        accepted = is_accepted(config, state, loss, jnp.float32(1))
        state = update_guard(state, loss, accepted)
        return state, (accepted, state.skipped_in_a_row)

    return jax.jit(lambda losses: jax.lax.scan(step, initial_guard(config), losses)[1])


def skipped(losses, window=128):
    return ~np.asarray(many_steps(window)(jnp.asarray(losses, jnp.float32))[0])


def mixture(share, seed, steps=20_000):
    """Returns the losses of an easy and a hard source, and which steps are hard."""
    generator = np.random.default_rng(seed)
    hard = generator.random(steps) < share
    return np.where(hard, generator.normal(4, 0.2, steps), generator.normal(2, 0.1, steps)), hard


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize(("share", "most"), [(0.1, 0.01), (0.05, 0.2)])
def test_a_harder_source_of_a_mixture_is_trained_on(share, most, seed):
    """If skipped losses were not in the window, every batch of such a source would be a spike."""
    losses, hard = mixture(share, seed)
    spikes = skipped(losses)
    assert spikes[hard].mean() < most
    assert spikes[len(losses) // 2 :][hard[len(losses) // 2 :]].mean() < most
    assert spikes[~hard].mean() < 1e-3


@pytest.mark.parametrize(("share", "window"), [(0.01, 128), (0.02, 128), (0.1, 32)])
def test_no_source_is_skipped_forever(share, window):
    losses, hard = mixture(share, seed=0)
    late = np.arange(len(losses)) > len(losses) // 2
    assert skipped(losses, window)[hard & late].mean() < 0.95


def test_a_source_that_comes_in_late_is_trained_on():
    easy = mixture(0.0, 0)[0]
    losses, hard = mixture(0.1, 1)
    assert skipped([*easy, *losses])[len(easy) :][hard].mean() < 0.02


@pytest.mark.parametrize("every", [97, 1000])
def test_real_spikes_are_skipped_as_often_as_they_come(every):
    losses = mixture(0.0, 0)[0]
    losses[500::every] = 10.0
    assert skipped(losses)[500::every].all()
    assert skipped(losses).sum() == len(losses[500::every])


def test_a_loss_that_stays_high_is_never_accepted():
    losses = mixture(0.0, 0)[0]
    losses[500:] += 3.0
    assert not skipped(losses)[:500].any()
    assert skipped(losses)[500:].all()


def test_another_stage_forgets_the_losses_and_keeps_the_counts():
    _, state = follow([1, 2, 3, 4, np.nan])
    state = next_stage_guard(state)
    assert (int(state.accepted), int(state.skipped), int(state.skipped_in_a_row)) == (0, 1, 1)
    assert follow([1000.0], state)[0] == [True]
