import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inference_models import make_model
from plain_decoder import RING, SEEN

from looplm_jax.config import Injection
from looplm_jax.inference import EngineConfig, Request
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._decoder import Decoder
from looplm_jax.inference._kv_cache import Cache, empty_cache, share
from looplm_jax.inference._loopwise_prefill import begin_chunk, bytes_per_prompt_token
from looplm_jax.inference._prefill import extract_row, prefill_chunk
from looplm_jax.models._looplm import ModelCache

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
    """Whatever the padding of the last chunk contains."""
    model, params = model_and_params
    row = empty_cache(model.config, CacheStrategy.FULL, rows=1, capacity=ROOM + 16, loops=LOOPS, dtype=jnp.float32)
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


@functools.cache
def decoder(strategy):
    model, params = make_model(num_layers=1, prelude_layers=1, coda_layers=1, injection=Injection.ADD, loops=LOOPS)
    config = EngineConfig(slots=1, capacity=ROOM + 16, page_size=8, chunk=4, cache=strategy, unroll=False)
    return Decoder(model, params, config)


def read(decoder, prompt):
    """The prompt, read into pages, and what these hold of it."""
    task = decoder.start_prefill(Request(prompt_ids=tuple(prompt), max_new_tokens=1))
    while not task.done:
        decoder.read_chunk(task)
    pages, length = np.array(task.pages), len(prompt)
    held = jax.tree.map(
        lambda whole: np.asarray(whole)[:, :, pages].reshape(*whole.shape[:2], -1, *whole.shape[4:])[:, :, :length],
        decoder._slots.cache.planes,
    )
    decoder.abandon(task)
    return task, held


@pytest.mark.parametrize(
    "strategy",
    [each if each == RING else pytest.param(each, marks=pytest.mark.slow) for each in SEEN if each.shares],
    ids=str,
)
def test_a_prompt_read_loop_by_loop_is_the_prompt_as_a_whole(model_and_params, strategy):
    """The cache has fewer planes than loops, though its tokens see all loops of one another."""
    model, params = model_and_params

    @settings(max_examples=6)
    @given(st.lists(st.integers(0, 96), min_size=1, max_size=ROOM))
    def check(prompt):
        length = len(prompt)
        task, held = read(decoder(strategy), prompt)
        output, planes = forward(model, params, np.array([[*prompt, *[0] * (ROOM - length)]], np.int32))
        core, coda = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), (planes.core, planes.coda))
        full = Cache(
            planes=ModelCache(core=core, prelude=jax.tree.map(lambda x: x[:, None], planes.prelude), coda=coda),
            lengths=np.array([length], np.int32),
            strategy=CacheStrategy.FULL,
        )
        for found, expected in zip(jax.tree.leaves(held), jax.tree.leaves(share(full, strategy).planes), strict=True):
            np.testing.assert_allclose(found, expected[:, :, 0, :length], atol=1e-4)
        np.testing.assert_allclose(task.last.hidden, output.hidden[:, 0, length - 1], atol=1e-4)
        np.testing.assert_allclose(task.last.gate_logits, output.gate_logits[:, 0, length - 1], atol=1e-4)

    check()


def test_a_prompt_read_loop_by_loop_makes_only_explicit_transfers():
    average = decoder(CacheStrategy.AVERAGE)
    task, held = read(average, range(10))
    with jax.transfer_guard("disallow"):
        again, held_again = read(average, range(10))
    np.testing.assert_array_equal(again.last.hidden, task.last.hidden)
    jax.tree.map(np.testing.assert_array_equal, held_again, held)


@pytest.mark.parametrize("strategy", [each for each in SEEN if each.shares], ids=str)
def test_bytes_of_a_prompt_that_is_being_read_are_those_of_the_formula(model_and_params, strategy):
    model, params = model_and_params
    size, dtype = 16, jnp.float32
    row = jax.eval_shape(lambda: empty_cache(model.config, strategy, rows=1, capacity=64, loops=LOOPS, dtype=dtype))
    tokens, count = jax.ShapeDtypeStruct((size,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    _, chunk = jax.eval_shape(functools.partial(begin_chunk, model), params, row, tokens, count)
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((chunk.embedded, chunk.state, chunk.kept)))
    assert taken == size * bytes_per_prompt_token(model.config, strategy, dtype)


@pytest.mark.parametrize("place", [0, 5, 9])
def test_a_prompt_that_is_not_finite_leaves_finite_pages(place):
    """Wherever the token is that makes it so, the states of the last token are not finite in any loop."""
    sound = decoder(CacheStrategy.AVERAGE)
    params = dict(sound._params)
    params["embedding"] = params["embedding"].at[7].set(np.nan)
    damaged = Decoder(sound.model, params, sound.config)
    prompt = [1] * 10
    prompt[place] = 7
    task, _ = read(damaged, prompt)
    assert not np.isfinite(task.last.hidden).all(axis=1).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(damaged._slots.cache.planes))


def filled(model, strategy, rows, capacity):
    shapes = jax.eval_shape(
        lambda: empty_cache(model.config, strategy, rows=rows, capacity=capacity, loops=LOOPS, dtype=jnp.float32)
    )
    generator = np.random.default_rng(0)
    cache = jax.tree.map(lambda leaf: jnp.asarray(generator.normal(size=leaf.shape).astype(leaf.dtype)), shapes)
    return cache.advance(jnp.arange(1, rows + 1) - cache.lengths)


@pytest.mark.parametrize("capacity", [4, 16])
@pytest.mark.parametrize("strategy", [CacheStrategy.FULL, CacheStrategy.LAST])
def test_a_slot_can_be_taken_out_again(model_and_params, strategy, capacity):
    model, _ = model_and_params
    cache = filled(model, strategy, rows=3, capacity=8)
    row = extract_row(cache, np.int32(1), capacity=capacity)
    depth = 1 if strategy.shares else LOOPS
    assert (row.strategy, row.depth, row.capacity, row.lengths.tolist()) == (strategy, depth, capacity, [2])
    np.testing.assert_array_equal(row.planes.core.keys[:, :, 0, :4], cache.planes.core.keys[:, :, 1, :4])
    assert not np.asarray(row.planes.core.keys[:, :, :, 8:]).any()
