import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import GuardConfig
from looplm_jax.training._guard import GuardState, initial_guard, update_guard, with_window

update = jax.jit(update_guard)


def after(losses, window):
    """Returns a guard that has accepted these losses."""
    state = jax.device_put(initial_guard(GuardConfig(window=window)))
    for loss in losses:
        state = update(state, jnp.float32(loss), jnp.array(True))
    return state


@given(st.integers(0, 9), st.integers(2, 6), st.integers(2, 6))
def test_another_window_is_as_if_it_had_been_so_over_the_losses_that_were_kept(seen, before, now):
    losses = np.arange(1.0, seen + 1)
    changed = with_window(after(losses, before), GuardConfig(window=now))
    kept = losses[max(0, seen - min(before, now)) :]
    wanted = after(kept, now) if before != now else after(losses, now)
    assert isinstance(changed, GuardState)
    assert changed.losses.tolist() == wanted.losses.tolist()
    assert int(changed.accepted) == int(wanted.accepted)
    one, other = (update(state, jnp.float32(99), jnp.array(True)) for state in (changed, wanted))
    assert one.losses.tolist() == other.losses.tolist()
