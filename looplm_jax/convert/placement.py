"""Tensors of files into our arrays, one array at a time, straight to the devices that hold them."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from looplm_jax.convert.layout import Path, TorchTensor
from looplm_jax.convert.weight_files import WeightFolder
from looplm_jax.errors import UserError

_COLUMNS = 16  # copied together: a transposed copy in blocks that fit into the cache takes a third of the time


def place_tensors(
    weights: WeightFolder, layout: Iterable[TorchTensor], targets: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[Path, Array]:
    """Our arrays, each filled from its tensors and put on its devices before the next one is begun.

    Besides the arrays that are done, memory holds one array and one tensor. What needs most of it comes first, while
    little else is there.

    Args:
      weights: where the tensors are; each is read once.
      layout: the tensors of the arrays, all there and of the right shapes (see `layout.account`).
      targets: shape, dtype and sharding of every array; layers are not sharded.

    Raises:
      UserError: a tensor holds a number that is not finite in the dtype of its array, by name.
    """
    parts: dict[Path, list[TorchTensor]] = {}
    for tensor in layout:
        parts.setdefault(tensor.path, []).append(tensor)

    def memory(path: Path) -> int:
        read = max(weights.tensors[tensor.name].nbytes for tensor in parts[path])
        return targets[path].size * targets[path].dtype.itemsize + 2 * read  # in the mapped file, and copied

    return {path: _place(weights, parts[path], targets[path]) for path in sorted(parts, key=memory, reverse=True)}


def _place(weights: WeightFolder, tensors: list[TorchTensor], target: jax.ShapeDtypeStruct) -> Array:
    """One array, from a buffer on the host for each of its different shards."""
    indices = {repr(index): index for index in target.sharding.addressable_devices_indices_map(target.shape).values()}
    shape = target.sharding.shard_shape(target.shape)
    shards = {key: np.empty(shape, target.dtype) for key in indices}
    for tensor in tensors:
        whole = tensor.to_ours(_read(weights, tensor.name, target.dtype))
        for key, index in indices.items():
            if tensor.layer is None:
                _copy(shards[key], whole[index])
            else:
                _copy(shards[key][tensor.layer], whole[index[1:]])
    array = jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: shards[repr(index)], dtype=target.dtype
    )
    return array.block_until_ready()  # after this the buffers are free, unless they became the array


def _read(weights: WeightFolder, name: str, dtype: Any) -> np.ndarray:
    stored = weights.tensors[name]
    with np.errstate(all="ignore"):  # what does not fit into a narrower dtype is found below
        tensor = weights.read(name).astype(dtype, copy=False)
    infinity = np.array(np.inf, dtype).view(f"u{tensor.itemsize}")  # all bits of the exponent
    bits = tensor.view(infinity.dtype)
    if np.max(bits & infinity, initial=0) == infinity:
        raise UserError(f"{stored.file}: tensor {name} holds NaN, or a number that is infinite in {np.dtype(dtype)}")
    return tensor


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    for start in range(0, source.shape[-1], _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        target[..., columns] = source[..., columns]
