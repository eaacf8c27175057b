"""Laws of the rotary embedding and of attention over several blocks of keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.models._attention import attend, attend_in_blocks, rotary_angles, rotate, visible

_rotate = jax.jit(lambda x, positions: rotate(x, *rotary_angles(positions, x.shape[-1], 100.0)))
_attend = jax.jit(attend)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@given(
    first=st.integers(0, 500),
    second=st.integers(0, 500),
    shift=st.integers(0, 500),
    seed=st.integers(0, 99),
)
def test_rotated_products_depend_on_the_distance_only(first, second, shift, seed):
    query, key = normal(seed, 1, 2, 3, 8), normal(seed + 1, 1, 2, 3, 8)

    def score(a, b):
        return np.sum(_rotate(query, jnp.full((1, 2), a)) * _rotate(key, jnp.full((1, 2), b)), axis=-1)

    np.testing.assert_allclose(score(first, second), score(first + shift, second + shift), atol=2e-3)


@given(position=st.integers(0, 60000), seed=st.integers(0, 99))
def test_rotation_keeps_lengths_and_position_zero_keeps_all(position, seed):
    x = normal(seed, 1, 2, 3, 8)
    turned = _rotate(x, jnp.full((1, 2), position))
    np.testing.assert_allclose(jnp.sum(turned**2, axis=-1), jnp.sum(x**2, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(_rotate(x, jnp.zeros((1, 2), jnp.int32)), x)


def test_rotation_pairs_an_element_with_that_of_the_other_half():
    x = jnp.zeros((1, 1, 1, 6)).at[..., 1].set(1.0)
    turned = _rotate(x, jnp.ones((1, 1), jnp.int32))[0, 0, 0]
    angle = 100.0 ** (-2 / 6)
    np.testing.assert_allclose(turned, [0, np.cos(angle), 0, 0, np.sin(angle), 0], atol=1e-6)


def test_visible_is_the_own_document_up_to_the_own_position():
    positions, segments = jnp.array([[0, 1, 0, 1, 0]]), jnp.array([[1, 1, 2, 2, 0]])
    seen = visible(positions, segments, positions, segments)[0].astype(int)
    np.testing.assert_array_equal(
        seen, [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    )


def test_keys_may_come_in_any_number_of_blocks():
    queries, keys, values = normal(0, 2, 3, 4, 6), normal(1, 2, 5, 2, 6), normal(2, 2, 5, 2, 6)
    mask = jnp.asarray(np.random.default_rng(3).random((2, 3, 5)) < 0.7).at[:, :, 0].set(True)
    whole = _attend(queries, (keys,), (values,), (mask,))
    cuts = [slice(0, 1), slice(1, 4), slice(4, 5)]
    parts = _attend(
        queries,
        tuple(keys[:, cut] for cut in cuts),
        tuple(values[:, cut] for cut in cuts),
        tuple(mask[:, :, cut] for cut in cuts),
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_grouped_queries_equal_repeated_keys_and_values():
    queries, keys, values = normal(0, 2, 3, 4, 6), normal(1, 2, 5, 2, 6), normal(2, 2, 5, 2, 6)
    mask = jnp.ones((2, 3, 5), bool)
    grouped = _attend(queries, (keys,), (values,), (mask,))
    repeated = _attend(queries, (jnp.repeat(keys, 2, axis=2),), (jnp.repeat(values, 2, axis=2),), (mask,))
    np.testing.assert_allclose(grouped, repeated, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_stays_finite():
    queries, keys = normal(0, 1, 2, 2, 4), normal(1, 1, 3, 2, 4)
    mask = jnp.zeros((1, 2, 3), bool)
    result, gradient = jax.value_and_grad(lambda q: jnp.sum(attend(q, (keys,), (keys,), (mask,))))(queries)
    assert np.isfinite(result)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("length", "kv_heads"), [(64, 2), (130, 4), pytest.param(257, 1, marks=pytest.mark.slow)])
def test_blocks_of_queries_give_the_same_values_and_gradients(length, kv_heads):
    """Documents end within blocks."""
    queries, keys, values = (
        normal(0, 2, length, 4, 8),
        normal(1, 2, length, kv_heads, 8),
        normal(2, 2, length, kv_heads, 8),
    )
    segments = jnp.sort(jnp.asarray(np.random.default_rng(3).integers(1, 4, (2, length))), axis=1)
    columns = jnp.broadcast_to(jnp.arange(length), (2, length))
    mask = visible(columns, segments, columns, segments)
    cotangents = normal(4, *queries.shape)

    def pulled_back(function):
        mixed, pull = jax.vjp(function, queries, keys, values)
        return mixed, pull(cotangents)

    whole = jax.jit(lambda: pulled_back(lambda q, k, v: attend(q, (k,), (v,), (mask,))))()
    blocks = jax.jit(lambda: pulled_back(lambda q, k, v: attend_in_blocks(q, k, v, mask)))()
    for found, wanted in zip(jax.tree.leaves(blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
