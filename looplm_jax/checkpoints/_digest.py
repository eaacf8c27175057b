"""A 64-bit digest of every array of a pytree, computed on the devices that hold it.

Each 32-bit word of an array is XORed with a hash of its position and mixed. The mixed words are summed modulo 2^32, in
two independently seeded 32-bit lanes. A sum does not depend on order, so the digest is the same for every sharding. The
mixer is a bijection of 32-bit words, so a change of one word always changes both lanes. Hashing the position detects
permutations.
"""

import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

_LANES = 2
_BLOCK_BYTES = 2**21
_NUMPY_BYTES = 2**24  # largest array that NumPy digests


def digests(arrays: dict[str, Array]) -> dict[str, str]:
    """Returns the digest of each array as 16 hexadecimal digits.

    A digest depends on values, shape and dtype, and not on sharding. All processes must call this together.

    One program, compiled once per set of names, shapes and shardings, digests most arrays. Two kinds are treated
    separately: large arrays on a single device are digested block by block, because not every compiler fuses the mixing
    into the sum, and blocks fit in caches; small arrays in host memory are digested with NumPy, which takes less time
    than compiling. Only the digests leave the devices.
    """
    by_numpy = {name for name, array in arrays.items() if array.nbytes <= _NUMPY_BYTES and _in_host_memory(array)}
    large = {name for name, array in arrays.items() if array.nbytes > _BLOCK_BYTES and len(array.devices()) == 1}
    large -= by_numpy  # what is left is on an accelerator, or too large for NumPy's temporaries
    small = sorted(set(arrays) - large - by_numpy)

    pending = {
        name: _digest_in_blocks(arrays[name], _BLOCK_BYTES) for name in large
    }  # dispatched asynchronously: all are started before the first result is awaited
    words = dict(zip(small, _on_host(_digest_all([arrays[name] for name in small])), strict=True)) if small else {}
    words |= {name: np.asarray(lanes) for name, lanes in pending.items()}
    words |= {name: _digest_by_numpy(np.asarray(arrays[name])) for name in by_numpy}

    return {name: "".join(f"{word:08x}" for word in words[name]) for name in sorted(words)}


@jax.jit
def _digest_all(arrays: list[Array]) -> UInt32[Array, "N lanes"]:
    """Returns the digests of several arrays from one program."""
    return jnp.stack([_digest_whole(array) for array in arrays])


# Arrays that are processed at once


@jax.jit  # parameters and both optimizer moments have the same shapes, so each shape is traced once
def _digest_whole(array: Array) -> UInt32[Array, "lanes"]:
    """Returns the digest of an array that is processed at once."""
    return _digest(array, _words(array), ())


def _digest_by_numpy(array: np.ndarray) -> np.ndarray:
    """Returns the same digest as `_digest_whole`, computed with NumPy."""
    # Narrow elements are widened to 32 bits; elements of 64 bits become two words.
    narrow = {1: np.uint8, 2: np.uint16}.get(array.dtype.itemsize, np.uint32)
    words = np.ravel(array).view(narrow).astype(np.uint32)
    two_words = (2,) if array.dtype.itemsize > words.itemsize else ()
    with np.errstate(over="ignore"):  # NumPy warns when a scalar wraps around
        return _digest(array, words.reshape(array.shape + two_words), (), np)


def _in_host_memory(array: Array) -> bool:
    return array.is_fully_addressable and next(iter(array.devices())).platform == "cpu"


# Arrays that are processed in blocks


@functools.partial(jax.jit, static_argnames="block_bytes")
def _digest_in_blocks(array: Array, block_bytes: int) -> UInt32[Array, "lanes"]:
    """Returns the digest of an array, computed in blocks of at most `block_bytes`."""
    return _digest_part(array, (), block_bytes)


def _digest_part(array: Array, outer: tuple[UInt32[Array, ""], ...], block_bytes: int) -> UInt32[Array, "lanes"]:
    """Returns the digest of `array[outer]`, computed in blocks along its first axis.

    If one row is larger than `block_bytes`, the function recurs into each row.
    """
    axis = len(outer)
    rows_in_all = array.shape[axis]
    row_bytes = math.prod(array.shape[axis + 1 :]) * array.dtype.itemsize
    if row_bytes > block_bytes and axis + 1 < array.ndim:
        return _sum(rows_in_all, lambda row: _digest_part(array, (*outer, row), block_bytes))

    rows = min(rows_in_all, max(1, block_bytes // row_bytes))
    rest = rows_in_all % rows

    def block(start: UInt32[Array, ""], count: int) -> UInt32[Array, "lanes"]:
        starts: list[Any] = [*outer, start, *(np.uint32(0) for _ in array.shape[axis + 1 :])]
        sizes = (*(1 for _ in outer), count, *array.shape[axis + 1 :])
        return _digest(array, _words(jax.lax.dynamic_slice(array, starts, sizes)), starts)

    # The rows that do not fill a whole block form one smaller block at the end.
    whole = _sum(rows_in_all // rows, lambda number: block(number * np.uint32(rows), rows))
    return whole + block(jnp.uint32(rows_in_all - rest), rest) if rest else whole


def _sum(count: int, part: Callable[[UInt32[Array, ""]], UInt32[Array, "lanes"]]) -> UInt32[Array, "lanes"]:
    """Returns the sum of the lanes of the parts 0 to `count - 1`, modulo 2^32."""

    def add(number: Array, lanes: UInt32[Array, "lanes"]) -> UInt32[Array, "lanes"]:
        return lanes + part(number.astype(jnp.uint32))

    return jax.lax.fori_loop(0, count, add, jnp.zeros(_LANES, jnp.uint32))


# Arithmetic


def _digest(array: Any, words: UInt32[Any, "..."], starts: Sequence[Any], xp: Any = jnp) -> UInt32[Any, "lanes"]:
    """Returns both lanes of the block of `array` that begins at `starts` and consists of `words`.

    Args:
      array: the whole array; only its shape and dtype are used, as the seed.
      words: the words of the block.
      starts: the first index of the block on each axis, or () for a block that begins at the origin.
      xp: `jax.numpy` or `numpy`.
    """
    # The seed contains dtype and shape, so a reinterpreted or reshaped array has another digest.
    seeds = [zlib.crc32(f"{array.dtype}{array.shape}{lane}".encode()) for lane in range(_LANES)]
    mixed = (_mix(words ^ _positions(words.shape, seed, starts, xp)) for seed in seeds)
    return xp.stack([xp.sum(lane, dtype=np.uint32) for lane in mixed])


def _words(array: Array) -> UInt32[Array, "..."]:
    """Returns the bits of every element as 32-bit words. Elements of 64 bits add a trailing axis of two words."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)


def _positions(shape: tuple[int, ...], seed: int, starts: Sequence[Any], xp: Any) -> UInt32[Any, "..."]:
    """Returns a hash of each multi-index of a block, whose leading axes begin at `starts`.

    The hash is a sum of one hash per axis, so no flat index has to fit in 32 bits.
    """
    position = xp.full(shape, np.uint32(seed))
    for axis, size in enumerate(shape):
        index = xp.arange(size, dtype=np.uint32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        index += starts[axis] if axis < len(starts) else np.uint32(0)
        of_axis = np.array([seed + axis + 1]).astype(np.uint32).reshape([1] * len(shape))
        position += _mix(index ^ _mix(of_axis))
    return position


def _mix(word: UInt32[Any, "..."]) -> UInt32[Any, "..."]:
    """Applies the finalizer of MurmurHash3, a bijection of 32-bit words."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def _on_host(array: Array) -> np.ndarray:
    """Returns the array as NumPy, gathered from all processes if necessary."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
