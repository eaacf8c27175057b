"""Writes weights to safetensors files of bounded size, with one tensor in memory at a time.

The `safetensors` library writes a file from tensors that are all in memory, so this module writes the format itself:
eight bytes with the length of a JSON header, the header, and the tensors one after another.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from looplm_jax.convert.layout import TorchTensor
from looplm_jax.errors import UserError

INDEX = "model.safetensors.index.json"
_DTYPE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8  # in bytes, of the start of the tensors; the library uses the same
_ROWS = 64  # rows made contiguous at a time: a transposed copy of a whole head would need its memory twice
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for binary, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,3})?)([A-Za-z]*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenWeights:
    """The names of the weight files, in order, and the total size of all tensors in bytes."""

    files: tuple[str, ...]
    bytes: int


def parse_size(text: str) -> int:
    """Returns the bytes of a size such as `500MB`, `5GB` (powers of 1000), `5GiB` (powers of 1024), or a plain number.

    Raises:
      UserError: `text` is not a size, or is less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise UserError(f"{text!r} is not a size; write 500MB, 5GB, 5GiB, or a number of bytes")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise UserError(f"a file cannot hold less than a byte, as {text!r} asks; write 500MB, 5GB, 5GiB, ...")
    return size


def write_weights(
    folder: Path,
    tensors: Sequence[TorchTensor],
    read: Callable[[TorchTensor], np.ndarray],
    *,
    dtype: str,
    max_bytes: int,
) -> WrittenWeights:
    """Writes `model.safetensors`, or shards and their index if it would be larger than `max_bytes`.

    Args:
      folder: the folder to write to.
      tensors: the tensors to write, in this order.
      read: returns a tensor in its PyTorch shape and in `dtype`; it is called once for each tensor.
      dtype: float32, float16 or bfloat16.
      max_bytes: the limit for the tensors of one file; only a single tensor may exceed it.
    """
    sizes = [math.prod(tensor.shape) * _item_size(dtype) for tensor in tensors]
    shards = _cut(tensors, sizes, max_bytes)
    names = _file_names(len(shards))

    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, read, dtype)

    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return WrittenWeights(files=names, bytes=sum(sizes))


def _cut(tensors: Sequence[TorchTensor], sizes: Sequence[int], max_bytes: int) -> list[list[TorchTensor]]:
    """Splits the tensors into files, in order, each as full as `max_bytes` allows."""
    shards: list[list[TorchTensor]] = [[]]
    room = max_bytes
    for tensor, size in zip(tensors, sizes, strict=True):
        # The second condition keeps an oversized tensor from leaving an empty shard before it.
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _file_names(count: int) -> tuple[str, ...]:
    """Returns the names of `count` weight files, as transformers writes them."""
    if count == 1:
        return ("model.safetensors",)
    return tuple(f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def _write_file(
    path: Path, tensors: Sequence[TorchTensor], read: Callable[[TorchTensor], np.ndarray], dtype: str
) -> None:
    """Writes one safetensors file."""
    # The entry that save_pretrained writes: these are tensors of PyTorch.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * _item_size(dtype)
        header[tensor.name] = {
            "dtype": _DTYPE_CODES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }

    encoded = json.dumps(header, separators=(",", ":")).encode()
    # Trailing spaces are valid JSON; they align the tensors after the header.
    encoded += b" " * (-len(encoded) % _ALIGNMENT)

    with path.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)

        # In blocks of rows, so that only a block of a transposed tensor is copied at a time.
        for tensor in tensors:
            values = read(tensor)
            for start in range(0, len(values), _ROWS):
                stream.write(np.ascontiguousarray(values[start : start + _ROWS]).view(np.uint8).data)


def _item_size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
