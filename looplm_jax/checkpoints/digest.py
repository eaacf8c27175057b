"""A 64-bit digest of every array of a tree, computed on the devices that hold it.

Each word of an array is mixed with a hash of its position, and the mixed words are summed modulo 2^32, in two
independent lanes. A sum does not care about order, so the digest is the same however the array is cut over devices. The
mixer is a bijection of 32-bit words, so that a change of one word always changes both lanes; the position makes a
permutation count.
"""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

_LANES = 2
_BLOCK_BYTES = 2**23


def digests(arrays: dict[str, Array]) -> dict[str, str]:
    """The digest of each array, 16 hexadecimal digits: of its values, shape and dtype, and not of its sharding.

    Arrays are digested by one program, compiled once for each set of names, shapes and shardings; only large ones that
    lie on one device are digested block after block, as not every compiler fuses the mixing into the sum. Only the
    digests leave the devices. All processes must call this together.
    """
    large = {name for name, array in arrays.items() if array.nbytes > _BLOCK_BYTES and len(array.devices()) == 1}
    small = sorted(set(arrays) - large)
    words = dict(zip(small, _on_host(_digest_all([arrays[name] for name in small])), strict=True)) if small else {}
    words |= {name: _digest_in_blocks(arrays[name]) for name in large}
    return {name: "".join(f"{word:08x}" for word in words[name]) for name in sorted(words)}


@jax.jit
def _digest_all(arrays: list[Array]) -> UInt32[Array, "N lanes"]:
    return jnp.stack([_digest(array, _words(array), np.uint32(0)) for array in arrays])


def _digest_in_blocks(array: Array) -> np.ndarray:
    """The digest of an array that lies on one device, a few rows of its first axis at a time."""
    total = array.shape[0]
    rows = max(1, _BLOCK_BYTES * total // array.nbytes)
    blocks = [
        np.asarray(_digest_block(array, np.uint32(start), rows=min(rows, total - start)))
        for start in range(0, total, rows)
    ]
    return np.stack(blocks).sum(axis=0, dtype=np.uint32)


@functools.partial(jax.jit, static_argnames="rows")
def _digest_block(array: Array, start: UInt32[Array, ""], *, rows: int) -> UInt32[Array, "lanes"]:
    return _digest(array, jax.lax.dynamic_slice_in_dim(_words(array), start, rows), start)


def _digest(array: Array, words: UInt32[Array, "..."], start: UInt32[Array, ""] | np.uint32) -> UInt32[Array, "lanes"]:
    """Both lanes of the rows of `array` that begin at `start` and have these words."""
    seeds = [np.uint32(zlib.crc32(f"{array.dtype}{array.shape}{lane}".encode())) for lane in range(_LANES)]
    mixed = (_mix(words ^ _positions(words.shape, seed, start)) for seed in seeds)
    return jnp.stack([jnp.sum(lane, dtype=jnp.uint32) for lane in mixed])


def _words(array: Array) -> UInt32[Array, "..."]:
    """The bits of every element in words of 32; elements of 64 bits add an axis of two words."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, narrow).astype(jnp.uint32)


def _positions(shape: tuple[int, ...], seed: np.uint32, start: UInt32[Array, ""] | np.uint32) -> UInt32[Array, "..."]:
    """A hash of each multi-index, the first axis counted from `start`.

    It is the sum of a hash per axis, so that no flat index has to fit in 32 bits.
    """
    position = jnp.full(shape, seed)
    for axis, size in enumerate(shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, [size if i == axis else 1 for i in range(len(shape))], axis)
        index += start if axis == 0 else np.uint32(0)
        position += _mix(index ^ _mix(jnp.uint32(seed) + jnp.uint32(axis + 1)))
    return position


def _mix(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3, a bijection of 32-bit words."""
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def _on_host(array: Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
