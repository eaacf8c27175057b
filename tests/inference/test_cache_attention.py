"""Three ways to attend to a cache: a gather, row by row, and the kernel of a TPU, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm_jax.inference.cache_attention import PastView, attend_row_by_row
from looplm_jax.inference.decode_kernel import decode_attention, fits
from looplm_jax.models.blocks import KeyValues

LAYERS, PLANES, ROWS, CAPACITY, WIDTH = 2, 3, 4, 96, 128
positions_filled = st.lists(st.integers(0, CAPACITY), min_size=ROWS, max_size=ROWS)
planes_read = st.lists(st.integers(0, PLANES - 1), min_size=ROWS, max_size=ROWS)


@functools.cache
def arrays(tokens, heads, kv_heads):
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    own, cached = (ROWS, tokens, kv_heads, WIDTH), (LAYERS, PLANES, ROWS, CAPACITY, kv_heads, WIDTH)
    return (
        normal(ROWS, tokens, heads, WIDTH),
        KeyValues(keys=normal(*own), values=normal(*own)),
        KeyValues(keys=normal(*cached), values=normal(*cached)),
    )


def by_definition(queries, own, stacked, layer, planes, lengths):
    """Token after token, head after head, over the keys that it sees and no others."""
    mixed, heads_a_key = np.empty(queries.shape), queries.shape[2] // own.keys.shape[2]
    for row, token, head in np.ndindex(queries.shape[:3]):
        at = layer, planes[row], row, slice(lengths[row]), head // heads_a_key
        mine = row, slice(token + 1), head // heads_a_key
        keys, values = (
            np.concatenate([past[at], new[mine]])
            for past, new in ((stacked.keys, own.keys), (stacked.values, own.values))
        )
        weights = np.exp(keys @ queries[row, token, head] / np.sqrt(WIDTH))
        mixed[row, token, head] = weights @ values / weights.sum()
    return mixed


@jax.jit
def row_by_row(queries, own, view, layer):
    tokens = queries.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (ROWS, tokens, tokens))
    return attend_row_by_row(view, layer, queries, own, mask)


@jax.jit
def by_kernel(queries, own, view, layer):
    one = jax.tree.map(lambda x: x[:, 0], own)
    return decode_attention(queries[:, 0], one, view.stacked, layer, view.planes, view.lengths)[:, None]


@pytest.mark.parametrize(("program", "tokens"), [(row_by_row, 1), (row_by_row, 3), (by_kernel, 1)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_all_filled_positions_of_the_own_row_and_plane_are_attended_to(program, tokens, heads, kv_heads):
    queries, own, stacked = arrays(tokens, heads, kv_heads)

    @settings(max_examples=10)
    @given(positions_filled, planes_read, st.integers(0, LAYERS - 1))
    def check(lengths, planes, layer):
        view = PastView(
            stacked=stacked,
            planes=np.array(planes, np.int32),
            lengths=np.array(lengths, np.int32),
            dtype=jnp.float32,
        )
        found = program(queries, own, view, np.int32(layer))
        np.testing.assert_allclose(found, by_definition(queries, own, stacked, layer, planes, lengths), atol=2e-5)

    check()


def test_the_kernel_takes_whole_lanes_and_blocks():
    assert fits(2048, 128)
    assert fits(80, 256)
    assert not fits(2048, 64)
    assert not fits(100, 128)
