import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from looplm_jax.checkpoints import digests
from looplm_jax.checkpoints._digest import _digest_all, _digest_by_numpy

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.uint32, jnp.int8)


def digest(array):
    return digests({"x": jnp.asarray(array)})["x"]


def lanes(text):
    return text[:8], text[8:]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_changes_both_lanes(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from([(), (5,), (3, 4), (2, 3, 4)]))
    size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=int))
    content = data.draw(st.binary(min_size=size, max_size=size))
    bit = data.draw(st.integers(0, 8 * size - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    one, other = (np.frombuffer(bytes(raw), dtype).reshape(shape) for raw in (content, flipped))
    assert all(a != b for a, b in zip(lanes(digest(one)), lanes(digest(other)), strict=True))


def test_a_flipped_boolean_changes_the_digest():
    assert digest(np.array([True, False])) != digest(np.array([True, True]))


@given(st.permutations(range(12)), st.sampled_from([(12,), (3, 4), (2, 3, 2)]))
@settings(max_examples=40, deadline=None)
def test_a_permutation_changes_the_digest(order, shape):
    values = np.arange(12, dtype=np.int32)
    same = list(order) == list(range(12))
    assert (digest(values.reshape(shape)) == digest(values[list(order)].reshape(shape))) == same


def test_transposed_rows_and_columns_of_zeros_and_ones_differ():
    one = np.zeros((4, 4), np.float32)
    one[0, 1] = 1
    assert digest(one) != digest(one.T)


def test_shape_and_dtype_are_part_of_the_digest():
    zeros = np.zeros(12, np.float32)
    found = [digest(x) for x in (zeros, zeros.reshape(3, 4), zeros.reshape(4, 3), zeros.view(np.int32), zeros[:11])]
    assert len(set(found)) == len(found)


def test_negative_zero_and_the_payload_of_a_nan_count():
    bits = np.array([0x7FC00000, 0x7FC00001, 0x80000000, 0], np.uint32).view(np.float32)
    assert len({digest(bits[i : i + 1]) for i in range(4)}) == 4


def test_no_arrays_have_no_digests():
    assert digests({}) == {}


@pytest.fixture
def on_devices(monkeypatch):
    """Makes arrays on the CPU be digested like arrays on an accelerator."""
    monkeypatch.setattr("looplm_jax.checkpoints._digest._in_host_memory", lambda _: False)


@pytest.mark.parametrize("dtype", [*DTYPES, jnp.bool_])
def test_the_digest_does_not_depend_on_what_computes_it(dtype, on_devices):
    random = np.random.default_rng(0)
    shapes = [(), (1,), (5,), (3, 4), (2, 3, 4), (0, 3)]
    arrays = {str(shape): jnp.asarray(random.integers(0, 99, shape)).astype(dtype) for shape in shapes}
    by_numpy = {name: _digest_by_numpy(np.asarray(array)) for name, array in arrays.items()}
    assert digests(arrays) == {name: "".join(f"{word:08x}" for word in words) for name, words in by_numpy.items()}


def test_elements_of_64_bits_are_two_words(on_devices):
    with jax.enable_x64(True):
        array = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)))
        assert array.dtype == jnp.float64
        assert digest(array) == "".join(f"{word:08x}" for word in _digest_by_numpy(np.asarray(array)))


def test_a_tree_is_digested_by_one_program_compiled_once(on_devices):
    arrays = {"a": jnp.ones((3, 5)), "b": jnp.arange(7)}
    digests(arrays)
    before = _digest_all._cache_size()
    digests({name: array + jnp.ones((), array.dtype) for name, array in arrays.items()})
    assert _digest_all._cache_size() == before


@pytest.mark.parametrize("block", [1, 24, 100, 10**6])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("shape", [(17,), (7, 3), (1, 5, 4)])
def test_the_digest_does_not_depend_on_the_size_of_blocks(monkeypatch, block, dtype, shape):
    array = jnp.asarray(np.random.default_rng(0).integers(-99, 99, shape)).astype(dtype)
    whole = digest(array)
    monkeypatch.setattr("looplm_jax.checkpoints._digest._BLOCK_BYTES", block)
    assert digest(array) == whole


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_the_digest_does_not_depend_on_the_sharding(on_devices):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    array = jax.random.normal(jax.random.key(0), (8, 16))
    found = {
        digest(jax.device_put(array, NamedSharding(mesh, spec)))
        for spec in (PartitionSpec(), PartitionSpec("x"), PartitionSpec("x", "y"), PartitionSpec(None, ("x", "y")))
    }
    assert found == {digest(array)}
