"""Four ways to attend to pages of a cache: gathered, together, row by row, and by the interpreted kernel of a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm_jax.inference import _cache_layout as head_lanes
from looplm_jax.inference._cache_attention import PastView, attend_row_by_row, attend_together
from looplm_jax.inference._cache_layout import LANES, at_positions, in_lanes, load_heads, store_heads
from looplm_jax.inference._decode_kernel import decode_attention, fits
from looplm_jax.models._blocks import KeyValues

LAYERS, PLANES, ROWS, WIDTH = 2, 3, 4, 128
PAGES, PAGE_SIZE, PAGES_PER_ROW = 14, 32, 3
CAPACITY = PAGES_PER_ROW * PAGE_SIZE
positions_filled = st.lists(st.integers(0, CAPACITY), min_size=ROWS, max_size=ROWS)
planes_read = st.lists(st.integers(0, PLANES - 1), min_size=ROWS, max_size=ROWS)
pages_in_any_order = st.permutations(range(PAGES))


@functools.cache
def arrays(tokens, heads, kv_heads):
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    own, cached = (ROWS, tokens, kv_heads, WIDTH), (LAYERS, PLANES, PAGES, PAGE_SIZE, kv_heads, WIDTH)
    return (
        normal(ROWS, tokens, heads, WIDTH),
        KeyValues(keys=normal(*own), values=normal(*own)),
        KeyValues(keys=normal(*cached), values=normal(*cached)),
    )


def by_definition(queries, own, view, layer):
    """Token after token, head after head, over the keys that it sees and no others."""
    mixed, heads_a_key = np.empty(queries.shape), queries.shape[2] // own.keys.shape[2]
    for row, token, head in np.ndindex(queries.shape[:3]):
        kv_head, positions = head // heads_a_key, np.arange(view.lengths[row])
        at = layer, view.planes[row], view.table[row, positions // PAGE_SIZE], positions % PAGE_SIZE, kv_head
        mine = row, slice(token + 1), kv_head
        keys, values = (
            np.concatenate([past[at], new[mine]])
            for past, new in ((view.stacked.keys, own.keys), (view.stacked.values, own.values))
        )
        weights = np.exp(keys @ queries[row, token, head] / np.sqrt(WIDTH))
        mixed[row, token, head] = weights @ values / weights.sum()
    return mixed


def table_of(pages, lengths):
    """As many pages as each row has filled, and no page after them."""
    table = np.array(pages[: ROWS * PAGES_PER_ROW], np.int32).reshape(ROWS, PAGES_PER_ROW)
    return np.where(np.arange(PAGES_PER_ROW) * PAGE_SIZE < np.array(lengths)[:, None], table, PAGES)


@jax.jit
def gathered(queries, own, view, layer):
    tokens = queries.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (ROWS, tokens, tokens))
    return view._gathered(layer, queries, own, mask)


@jax.jit
def together(queries, own, view, layer):
    tokens = queries.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (ROWS, tokens, tokens))
    return attend_together(view, layer, queries, own, mask)


@jax.jit
def row_by_row(queries, own, view, layer):
    tokens = queries.shape[1]
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens, tokens), bool)), (ROWS, tokens, tokens))
    return attend_row_by_row(view, layer, queries, own, mask)


@jax.jit
def by_kernel(queries, own, view, layer):
    one = jax.tree.map(lambda x: x[:, 0], own)
    return decode_attention(queries[:, 0], one, view.stacked, layer, view.planes, view.table, view.lengths)[:, None]


@pytest.mark.parametrize(
    ("program", "tokens"),
    [(gathered, 3), (together, 1), (together, 3), (row_by_row, 1), (row_by_row, 3), (by_kernel, 1)],
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_all_filled_positions_of_the_own_row_and_plane_are_attended_to(program, tokens, heads, kv_heads):
    queries, own, stacked = arrays(tokens, heads, kv_heads)

    @settings(max_examples=10)
    @given(positions_filled, planes_read, pages_in_any_order, st.integers(0, LAYERS - 1))
    def check(lengths, planes, pages, layer):
        view = PastView(
            stacked=stacked,
            planes=np.array(planes, np.int32),
            table=table_of(pages, lengths),
            lengths=np.array(lengths, np.int32),
            dtype=jnp.float32,
        )
        found = program(queries, own, view, np.int32(layer))
        np.testing.assert_allclose(found, by_definition(queries, own, view, layer), atol=2e-5)

    check()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(6, 2, 64), (3, 3, 96), (4, 1, 128)])
def test_heads_stored_in_lanes_are_attended_to_as_heads(heads, kv_heads, width):
    generator = np.random.default_rng(1)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    def view(stacked):
        return PastView(
            stacked=stacked,
            planes=np.array([0, 2, 1, 0], np.int32),
            table=table_of(range(PAGES), lengths),
            lengths=np.array(lengths, np.int32),
            dtype=jnp.float32,
        )

    lengths, own = (0, 5, 64, 90), (ROWS, 1, kv_heads, width)
    queries, own = normal(ROWS, 1, heads, width), KeyValues(keys=normal(*own), values=normal(*own))
    cached = (LAYERS, PLANES, PAGES, PAGE_SIZE, kv_heads, width)
    stacked = KeyValues(keys=normal(*cached), values=normal(*cached))
    stored = jax.tree.map(lambda x: store_heads(jnp.asarray(x), in_lanes(kv_heads, width)), stacked)
    assert stored.keys.shape[4:] == {64: (1, 128), 96: (3, 128), 128: (1, 128)}[width]
    expected = gathered(queries, own, view(stacked), np.int32(1))
    for program in (by_kernel, row_by_row, gathered):
        np.testing.assert_allclose(program(queries, own, view(stored), np.int32(1)), expected, atol=2e-5)


@given(st.integers(1, 16), st.integers(1, 4), st.integers(1, 160))
def test_stored_heads_fill_whole_lanes_and_divide_over_devices(heads_of_device, devices, half_width):
    heads, width = heads_of_device * devices, 2 * half_width
    rows, stored_width = in_lanes(heads, width, devices=devices)
    assert stored_width % LANES == 0
    assert rows % devices == heads % rows == 0
    assert stored_width - heads // rows * width < LANES
    array = jnp.asarray(np.arange(2 * heads * width, dtype=np.float32).reshape(2, heads, width))
    stored = store_heads(array, (rows, stored_width))
    assert stored.shape == (2, rows, stored_width)
    np.testing.assert_array_equal(load_heads(stored, (heads, width)), array)


def test_the_kernel_takes_whole_lanes_and_blocks():
    assert fits(2048, 128)
    assert fits(80, 256)
    assert not fits(2048, 64)
    assert not fits(100, 128)


@pytest.mark.parametrize(("rows", "devices"), [(1, 1), (2, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("sliced", [1, 2])
def test_positions_are_the_same_for_any_number_of_rows_of_heads(rows, devices, sliced, monkeypatch):
    """With one row on each device the index has no slices. Page 5 is absent: dropped, or read as zeros."""
    monkeypatch.setattr(head_lanes, "_devices_of_heads", lambda: devices)
    generator = np.random.default_rng(0)
    stored = jnp.asarray(generator.normal(size=(LAYERS, PLANES, 5, 4, rows, 8)))
    planes, pages, offsets = (
        np.arange(PLANES)[:, None],
        np.array([[0, 5, 2], [1, 1, 5], [5, 3, 4]]),
        np.array([1, 2, 3]),
    )
    index = (slice(None), planes, pages, offsets) if sliced == 1 else (slice(None), slice(None), pages, offsets)
    usual, found = stored.at[index], at_positions(stored, *index)
    read = usual.get(mode="fill", fill_value=0)
    np.testing.assert_array_equal(found.get(mode="fill", fill_value=0), read)
    np.testing.assert_array_equal(found.set(read + 1, mode="drop"), usual.set(read + 1, mode="drop"))
