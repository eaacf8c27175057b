"""Reads and writes safetensors files, with one tensor in memory at a time.

The safetensors library checks every header against the length of its file, so a tensor that is listed here is complete.
It writes a file from tensors that are all in memory, so files are written here: eight bytes with the length of a JSON
header, the header, and the tensors one after another.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from looplm_jax.convert._layout import TorchTensor
from looplm_jax.errors import UserError, brief
from looplm_jax.json_io import read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

# Loading a pickle runs whatever code is in it.
_PICKLED = ("*.bin", "*.pt", "*.pth")
# Names of files in an index. They may not lead out of the folder.
_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
_SHOWN = 80

_DTYPE_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ALIGNMENT = 8  # in bytes, of the start of the tensors; the library uses the same
_ROWS = 64  # rows made contiguous at a time: a transposed copy of a whole head would need its memory twice
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for binary, base in (("", 1000), ("i", 1024))
}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,3})?)([A-Za-z]*)")


# Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The header entry of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Returns the size of the tensor in bytes."""
        # dtype=object: Python integers do not overflow.
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFolder:
    """The safetensors files of one model: a single file, or shards with an index."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path: Path) -> "WeightFolder":
        """Reads the headers of all files.

        Raises:
          UserError: the folder is missing, it has no safetensors (pickled files are refused), a file is damaged, the
            index does not agree with its shards, or a tensor has a dtype other than float32, bfloat16 and float16.
        """
        single, index = _locate(path)
        return cls(path=path, tensors=_read_shards(path, index) if index else _read_header(single))

    def read(self, name: str) -> np.ndarray:
        """Returns a copy of one tensor. The file is mapped only during the read, so none of it stays in memory.

        Raises:
          UserError: the file can no longer be read.
        """
        file = self.tensors[name].file
        with _reading(file), safe_open(file, framework="np") as stored:
            return stored.get_tensor(name)

    def common_dtype(self, names: Iterable[str]) -> np.dtype:
        """Returns the dtype in which all these tensors are stored.

        Raises:
          UserError: they are stored in more than one dtype.
        """
        example: dict[np.dtype, str] = {}
        for name in names:
            example.setdefault(self.tensors[name].dtype, name)

        if len(example) > 1:
            stored = ", ".join(f"{name} in {dtype}" for dtype, name in example.items())
            raise UserError(f"{self.path} has tensors of several types ({stored}); choose one with dtype")
        return next(iter(example))


# Finding the files


def has_weights(path: Path) -> bool:
    """Whether `path` is a folder with the weights of a Hugging Face model, in any format."""
    return path.is_dir() and any(
        # An incomplete download may have shards without an index.
        next(path.glob(form), None)
        for form in (SINGLE, INDEX, "model-*.safetensors", *_PICKLED)
    )


def _locate(folder: Path) -> tuple[Path, Path | None]:
    """Returns the paths of the single file and of the index; the index is None if there are no shards."""
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder of a Hugging Face model")

    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        # Loading either one silently could load stale weights.
        raise UserError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is out of date")
    if single.exists() or index.exists():
        return single, index if index.exists() else None

    pickled = sorted(found.name for form in _PICKLED for found in folder.glob(form))
    if pickled:
        raise UserError(
            f"{folder} holds {_brief(pickled[0])} but no safetensors; a pickled file is refused, since reading it runs "
            "whatever code its author put in: save the model again with save_pretrained(..., safe_serialization=True)"
        )
    raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a Hugging Face model")


# Reading headers


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of all shards. Raises UserError unless the index and the shards list the same tensors."""
    shard_of = _weight_map(index)
    found: dict[str, StoredTensor] = {}
    # Each shard once, in the order of the index.
    for shard in dict.fromkeys(shard_of.values()):
        if not (folder / shard).exists():
            raise UserError(f"{index} names {shard}, which is missing; copy it to {folder}")
        for name, stored in _read_header(folder / shard).items():
            if shard_of.get(name) != shard:
                raise UserError(f"{folder / shard} holds tensor {name}, which {INDEX} does not name there")
            found[name] = stored

    # The reverse direction: every tensor of the index was found.
    for name, shard in shard_of.items():
        if name not in found:
            raise UserError(f"{index} names tensor {_brief(name)} in {shard}, which does not hold it")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Returns the shard of each tensor."""
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise UserError(f"{index} has no weight_map from tensors to files; copy it again")
    for shard in shard_of.values():
        # The name is joined to the folder, so it must not lead out of it.
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise UserError(
                f"{index} names the file {_brief(shard)}; a shard is a .safetensors file of the same folder"
            )
    return shard_of


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of one file, from its header."""
    if not file.is_file():
        raise UserError(f"{file} is not a file; copy it again")
    with _reading(file), safe_open(file, framework="np") as stored:
        names = list(stored.keys())
        headers = {name: stored.get_slice(name) for name in names}
        listed = {name: (tuple(header.get_shape()), header.get_dtype()) for name, header in headers.items()}

    for name, (_, dtype) in listed.items():
        # Names are shown in messages and used as keys, so control characters are refused.
        if not name.isprintable():
            raise UserError(f"{file} holds a tensor called {_brief(name)}, which is not a PyTorch name")
        if dtype not in _DTYPES:
            raise UserError(f"{file}: tensor {name} is stored as {dtype}; weights are F32, BF16 or F16")

    return {
        name: StoredTensor(file=file, shape=shape, dtype=jnp.dtype(_DTYPES[dtype]))
        for name, (shape, dtype) in listed.items()
    }


# Errors of reading


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns errors of the read into UserErrors that name the file."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{file} is damaged, or is not safetensors ({brief(error)}); copy it again") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read ({brief(error)}); check its permissions and its disk") from None


def _brief(value: object) -> str:
    """Returns the repr of a value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# Writing


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
        raise UserError(f"{text!r} is less than one byte; write 500MB, 5GB, 5GiB, or a number of bytes")
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
    shards = _split_into_files(tensors, sizes, max_bytes)
    names = _file_names(len(shards))

    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, read, dtype)

    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return WrittenWeights(files=names, bytes=sum(sizes))


def _split_into_files(tensors: Sequence[TorchTensor], sizes: Sequence[int], max_bytes: int) -> list[list[TorchTensor]]:
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
