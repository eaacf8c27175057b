"""Reads tensors from files into our arrays, one array at a time, directly onto the devices that hold them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from looplm_jax.convert.layout import Path, TorchTensor
from looplm_jax.convert.weight_files import WeightFolder
from looplm_jax.errors import UserError

_COLUMNS = 16  # columns copied at a time: a transposed copy in blocks that fit the cache takes a third of the time


def place_tensors(
    weights: WeightFolder, layout: Iterable[TorchTensor], targets: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[Path, Array]:
    """Returns our arrays. Each is filled from its tensors and placed on its devices before the next one starts.

    In addition to the finished arrays, memory holds one array and one tensor. The array that needs the most memory
    comes first, while few others exist.

    Args:
      weights: the files of the tensors; each tensor is read once.
      layout: the tensors of the arrays, all present and of the right shapes (see `layout.account`).
      targets: shape, dtype and sharding of every array; the axis of layers is not sharded.

    Raises:
      UserError: a tensor has a value that is not finite in the dtype of its array; the message names the tensor.
    """
    parts: dict[Path, list[TorchTensor]] = {}
    for tensor in layout:
        parts.setdefault(tensor.path, []).append(tensor)

    def memory(path: Path) -> int:
        read = max(weights.tensors[tensor.name].nbytes for tensor in parts[path])
        return targets[path].size * targets[path].dtype.itemsize + 2 * read  # once in the mapped file, once as a copy

    return {path: _place(weights, parts[path], targets[path]) for path in sorted(parts, key=memory, reverse=True)}


def _place(weights: WeightFolder, tensors: list[TorchTensor], target: jax.ShapeDtypeStruct) -> Array:
    """Returns one array, assembled in one host buffer for each distinct shard."""
    # Replicas have equal indices, so they share a buffer. Slices are not hashable before Python 3.12, their repr is.
    indices = {repr(index): index for index in target.sharding.addressable_devices_indices_map(target.shape).values()}
    shape = target.sharding.shard_shape(target.shape)
    shards = {key: np.empty(shape, target.dtype) for key in indices}

    for tensor in tensors:
        whole = tensor.to_ours(_read(weights, tensor.name, target.dtype))
        for key, index in indices.items():
            if tensor.layer is None:
                _copy(shards[key], whole[index])
            else:
                # index[0] selects layers, which are not sharded.
                _copy(shards[key][tensor.layer], whole[index[1:]])

    array = jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: shards[repr(index)], dtype=target.dtype
    )
    return array.block_until_ready()  # the buffers are free after this, unless they became the array


def _read(weights: WeightFolder, name: str, dtype: Any) -> np.ndarray:
    """Returns a tensor in `dtype`. Raises UserError if a value is not finite in it."""
    stored = weights.tensors[name]
    with np.errstate(all="ignore"):  # overflow in a narrower dtype is detected below
        tensor = weights.read(name).astype(dtype, copy=False)

    # A value is not finite if all bits of its exponent are set.
    infinity = np.array(np.inf, dtype).view(f"u{tensor.itemsize}")  # all exponent bits set
    bits = tensor.view(infinity.dtype)
    if np.max(bits & infinity, initial=0) == infinity:
        raise UserError(f"{stored.file}: tensor {name} holds NaN, or a number that is infinite in {np.dtype(dtype)}")
    return tensor


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    for start in range(0, source.shape[-1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        target[..., columns] = source[..., columns]
