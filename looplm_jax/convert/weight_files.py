"""The tensors of a Hugging Face folder: lists which file holds which tensor, and reads one tensor at a time.

Only safetensors files are read. The safetensors library checks every header against the length of its file, so a tensor
that is listed here is complete.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from looplm_jax.checkpoints.errors import brief
from looplm_jax.errors import UserError
from looplm_jax.json_files import read_json_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth")
_SHARD_NAME = re.compile(r"[\w.-]{1,200}\.safetensors", re.ASCII)
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
_SHOWN = 80


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
        return cls(path=path, tensors=_of_shards(path, index) if index else _of_file(single))

    def read(self, name: str) -> np.ndarray:
        """Returns a copy of one tensor. The file is mapped only during the read, so none of it stays in memory.

        Raises:
          UserError: the file can no longer be read.
        """
        file = self.tensors[name].file
        with _reading(file), safe_open(file, framework="np") as stored:
            return stored.get_tensor(name)

    def one_dtype(self, names: Iterable[str]) -> np.dtype:
        """Returns the dtype in which all these tensors are stored.

        Raises:
          UserError: they are stored in more than one dtype.
        """
        example: dict[np.dtype, str] = {}
        for name in names:
            example.setdefault(self.tensors[name].dtype, name)

        if len(example) > 1:
            stored = ", ".join(f"{name} in {dtype}" for dtype, name in example.items())
            raise UserError(f"{self.path} has tensors of several types ({stored}); name the one you want with dtype")
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


def _of_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of all shards. Raises UserError unless the index and the shards list the same tensors."""
    shard_of = _weight_map(index)
    found: dict[str, StoredTensor] = {}
    # Each shard once, in the order of the index.
    for shard in dict.fromkeys(shard_of.values()):
        if not (folder / shard).exists():
            raise UserError(f"{index} names {shard}, which is missing; copy it to {folder}")
        for name, stored in _of_file(folder / shard).items():
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


def _of_file(file: Path) -> dict[str, StoredTensor]:
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
            raise UserError(f"{file} holds a tensor called {_brief(name)}, which is no name of PyTorch's")
        if dtype not in _DTYPES:
            raise UserError(f"{file}: tensor {name} is stored as {dtype}; weights are F32, BF16 or F16")

    return {
        name: StoredTensor(file=file, shape=shape, dtype=jnp.dtype(_DTYPES[dtype]))
        for name, (shape, dtype) in listed.items()
    }


# Errors


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
