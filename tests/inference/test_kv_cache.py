import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_decoder import RING, SEEN

from looplm_jax.errors import UserError
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._kv_cache import Cache, bucket, bytes_per_token, empty_cache, share
from looplm_jax.models._blocks import KeyValues
from looplm_jax.models._looplm import ModelCache
from looplm_jax.models.presets import tiny

LOOPS, ROWS, CAPACITY = 3, 2, 4
CACHES = (*SEEN, CacheStrategy("ring(1)"), CacheStrategy("ring(3)"))
# A ring of one plane is `LAST`, and one of all loops is `FULL`.
MEANING = SEEN | {CACHES[-2]: SEEN[CacheStrategy.LAST], CACHES[-1]: SEEN[CacheStrategy.FULL]}
CONFIG = dataclasses.replace(tiny(), num_layers=1, prelude_layers=2, coda_layers=1)


def cache_shape(strategy, dtype=jnp.float32):
    return jax.eval_shape(lambda: empty_cache(CONFIG, strategy, rows=ROWS, capacity=CAPACITY, loops=LOOPS, dtype=dtype))


def zeros(strategy):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), cache_shape(strategy))


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 4), (jnp.bfloat16, 2)])
@pytest.mark.parametrize("strategy", CACHES, ids=str)
def test_bytes_are_those_of_the_formula(strategy, dtype, size):
    leaves = jax.tree.leaves(cache_shape(strategy, dtype).planes)
    taken = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    formula = bytes_per_token(CONFIG, strategy, loops=LOOPS, dtype=dtype)
    planes = {"full": LOOPS, "ring(2)": 2, "ring(3)": 3}.get(strategy.value, 1)
    assert taken == ROWS * CAPACITY * formula
    assert formula == 2 * (2 + planes * (1 + 1)) * CONFIG.kv_heads * CONFIG.head_width * size


def test_a_shared_cache_is_as_many_times_smaller_as_there_are_loops():
    full, last = (
        bytes_per_token(tiny(), strategy, loops=4, dtype=jnp.bfloat16)
        for strategy in (CacheStrategy.FULL, CacheStrategy.LAST)
    )
    assert full == 4 * last


write = jax.jit(Cache.write)


def own_keys_and_values(generator):
    def new(layers):
        shape = (layers, ROWS, 1, CONFIG.kv_heads, CONFIG.head_width)
        return KeyValues(*(generator.normal(size=shape).astype(np.float32) for _ in range(2)))

    return ModelCache(core=new(1), prelude=new(2), coda=new(1))


@pytest.mark.parametrize("strategy", CACHES, ids=str)
def test_a_position_keeps_what_its_strategy_says(strategy):
    """Rows at different loops and positions, one of them idle at times; every plane against the definition."""
    generator = np.random.default_rng(0)
    cache = zeros(strategy)
    exits = [[2, 3, 1], [3, 1, 2]]  # loops of each token of each row
    kept = [[[] for _ in row] for row in exits]
    done, place = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)
    for number in range(20):
        active = np.array([place[row] < 3 and (number + row) % 3 != 0 for row in range(ROWS)])
        own = own_keys_and_values(generator)
        # Copies, because programs that run later may read the arrays in place.
        cache = write(cache, own, done.copy(), active)
        for row in np.flatnonzero(active):
            kept[row][place[row]].append(own.core.keys[:, row, 0])
            done[row] += 1
            if done[row] == exits[row][place[row]]:
                place[row], done[row] = place[row] + 1, 0
        cache = cache.advance(jnp.asarray(place.copy()) - cache.lengths)
    assert [[len(loops) for loops in row] for row in kept] == exits
    for row, token in np.ndindex(ROWS, 3):
        for plane in range(cache.depth):
            seen = MEANING[strategy](kept[row][token], plane + 1)
            np.testing.assert_allclose(cache.planes.core.keys[:, plane, row, token], seen, atol=1e-6)
    assert not np.asarray(cache.planes.core.keys)[:, :, :, 3].any()


def test_the_prelude_is_written_once():
    generator = np.random.default_rng(1)
    first, second = own_keys_and_values(generator), own_keys_and_values(generator)
    everyone = np.ones(ROWS, bool)
    cache = write(zeros(CacheStrategy.FULL), first, np.zeros(ROWS, np.int32), everyone)
    cache = write(cache, second, np.ones(ROWS, np.int32), everyone)
    np.testing.assert_array_equal(cache.planes.prelude.keys[:, 0, :, 0], first.prelude.keys[:, :, 0])


@pytest.mark.parametrize("strategy", CACHES, ids=str)
def test_a_prompt_keeps_of_its_loops_what_a_token_keeps(strategy):
    generator = np.random.default_rng(2)
    full = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype), cache_shape(CacheStrategy.FULL)
    )
    shared = jax.jit(functools.partial(share, strategy=strategy))(full)
    planes = full.planes.core.values
    for plane in range(shared.depth):
        seen = MEANING[strategy]([planes[:, loop] for loop in range(LOOPS)], plane + 1)
        np.testing.assert_allclose(shared.planes.core.values[:, plane], seen, atol=1e-6)
    np.testing.assert_array_equal(shared.planes.prelude.keys, full.planes.prelude.keys)


def test_a_strategy_is_known_by_its_name():
    assert CacheStrategy("last") == CacheStrategy.LAST
    assert (RING.value, RING.ring, RING.planes(2), CacheStrategy.FULL.ring) == ("ring(2)", 2, 2, None)
    for name in ("lost", "ring", "ring(0)", "ring(02)", "ring(2", 3):
        with pytest.raises(UserError, match=f"^unknown cache {re.escape(repr(name))}"):
            CacheStrategy(name)
    with pytest.raises(UserError) as error:
        cache_shape(CacheStrategy("ring(4)"))
    assert str(error.value) == "cache ring(4) has more planes than the 3 loops; use the cache full"


@given(st.integers(1, 5000), st.integers(64, 5000))
def test_buckets_are_few_and_large_enough(length, longest):
    size = bucket(length, longest)
    assert size >= min(length, longest)
    assert size == longest or (size >= 64 and size & (size - 1) == 0 and (size == 64 or size < 2 * length))
