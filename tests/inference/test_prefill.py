import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_models import make_model

from looplm_jax.config import Injection
from looplm_jax.inference.kv_cache import CacheStrategy, empty_cache
from looplm_jax.inference.prefill import empty_row, extract_row, prefill_chunk, widen_row

LOOPS, ROOM = 3, 32


@pytest.fixture(scope="module")
def model_and_params():
    return make_model(num_layers=1, prelude_layers=1, coda_layers=1, injection=Injection.ADD, loops=LOOPS)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return model.apply({"params": params}, tokens, method="prefill")


@settings(max_examples=8)
@given(st.lists(st.integers(0, 96), min_size=1, max_size=ROOM), st.sampled_from([4, 16]), st.integers(0, 96))
def test_a_prompt_in_chunks_is_the_prompt_as_a_whole(model_and_params, prompt, chunk, padding):
    """Whatever stands in the padding of the last chunk."""
    model, params = model_and_params
    row = empty_row(model, capacity=ROOM + 16, loops=LOOPS, dtype=jnp.float32)
    for start in range(0, len(prompt), chunk):
        piece = prompt[start : start + chunk]
        tokens = np.array([*piece, *[padding] * (chunk - len(piece))], np.int32)
        row, last = prefill_chunk(model, params, row, tokens, np.int32(len(piece)))
    whole = np.array([[*prompt, *[0] * (ROOM - len(prompt))]], np.int32)
    output, planes = forward(model, params, whole)
    length = len(prompt)
    assert row.lengths.tolist() == [length]
    for name in ("core", "coda"):
        expected = np.swapaxes(getattr(planes, name).values, 0, 1)[:, :, :, :length]
        np.testing.assert_allclose(getattr(row.planes, name).values[:, :, :, :length], expected, atol=1e-4)
    np.testing.assert_allclose(row.planes.prelude.keys[:, 0, :, :length], planes.prelude.keys[:, :, :length], atol=1e-4)
    np.testing.assert_allclose(last.hidden, output.hidden[:, 0, length - 1], atol=1e-4)
    np.testing.assert_allclose(last.gate_logits, output.gate_logits[:, 0, length - 1], atol=1e-4)


def filled(model, strategy, rows, capacity):
    shapes = jax.eval_shape(
        lambda: empty_cache(model.config, strategy, rows=rows, capacity=capacity, loops=LOOPS, dtype=jnp.float32)
    )
    generator = np.random.default_rng(0)
    cache = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    return cache.advance(np.arange(1, rows + 1, dtype=np.int32) - cache.lengths)


@pytest.mark.parametrize("capacity", [4, 16])
def test_a_slot_can_be_taken_out_again(model_and_params, capacity):
    model, _ = model_and_params
    cache = filled(model, CacheStrategy.LAST, rows=3, capacity=8)
    row = extract_row(cache, np.int32(1), loops=LOOPS, capacity=capacity)
    assert (row.strategy, row.depth, row.capacity, row.lengths.tolist()) == (CacheStrategy.FULL, LOOPS, capacity, [2])
    for loop in range(LOOPS):
        np.testing.assert_array_equal(row.planes.core.keys[:, loop, 0, :4], cache.planes.core.keys[:, 0, 1, :4])
    assert not np.asarray(row.planes.core.keys[:, :, :, 8:]).any()


def test_a_row_gets_more_room(model_and_params):
    model, _ = model_and_params
    row = filled(model, CacheStrategy.FULL, rows=1, capacity=8)
    wide = widen_row(row, capacity=16)
    assert (wide.capacity, wide.lengths.tolist()) == (16, [1])
    np.testing.assert_array_equal(wide.planes.coda.values[:, :, :, :8], row.planes.coda.values)
