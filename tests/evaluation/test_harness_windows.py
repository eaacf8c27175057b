import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness._scoring import Window, window_batches

TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=200)


@given(TOKENS, TOKENS)
def test_a_window_ends_with_its_continuation_and_is_cut_on_the_left(context, continuation):
    longest = 200
    window = Window.of(context, continuation, longest)
    whole = (*context, *continuation)
    assert window.scored == len(continuation)
    assert window.tokens == whole[max(len(whole) - longest - 1, 0) :]


def test_a_continuation_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="a continuation of 9 tokens does not fit the 8 that the model reads"):
        Window.of([1], [2] * 9, 8)


@given(st.lists(st.tuples(TOKENS, st.lists(st.integers(1, 99), max_size=70)), max_size=12), st.integers(1, 5))
def test_every_scored_token_is_in_one_batch(pairs, rows):
    windows = [Window.of(context, continuation, 256) for context, continuation in pairs]
    batches = list(window_batches(windows, rows=rows, longest=256))
    indices = [index for batch in batches for index in batch.indices]
    assert sorted(indices) == [index for index, window in enumerate(windows) if window.scored]
    for batch in batches:
        assert batch.tokens.shape[0] == batch.targets.shape[0] == rows
        for row, index in enumerate(batch.indices):
            window = windows[index]
            places = batch.read_positions[row, : window.scored]
            assert tuple(batch.targets[row, : window.scored]) == window.tokens[-window.scored :]
            np.testing.assert_array_equal(batch.tokens[row, places], window.tokens[-window.scored - 1 : -1])


def test_lengths_share_few_shapes():
    windows = [Window.of([1] * length, [2] * scored, 1024) for length in range(1, 900, 7) for scored in (1, 9, 60)]
    shapes = {(batch.tokens.shape, batch.targets.shape) for batch in window_batches(windows, rows=4, longest=1024)}
    assert shapes == {((4, size), (4, 64)) for size in (64, 128, 256, 512, 1024)}
