"""The arrays of a step: their dotted names, and how they are read.

They are read from the TensorStore files that Orbax writes (OCDBT, Zarr version 3), but not by Orbax: it reads through
an event loop. When one array is damaged, its other reads are left running on a closed loop, and their threads print
tracebacks. Here each read is a separate future, and each error names its array.
"""

import collections
import contextlib
import dataclasses
import errno
import math
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import tensorstore as ts
from etils import epath
from jaxtyping import Array

from looplm_jax.checkpoints._metadata import DamagedError, RefusedError, UnreadableError
from looplm_jax.checkpoints._paths import kvstore
from looplm_jax.errors import UserError, brief
from looplm_jax.files import check_regular, in_bucket
from looplm_jax.sharding._mesh import require_platform

OS_ERROR = re.compile(r"(?:os_error_code='|OS error )(\d+)")  # in the messages of TensorStore

# Status codes with which TensorStore reports damaged or missing files. Any other code is about access to them.
_FOUND_IN_FILES = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED")
_ERRORS_OF_TENSORSTORE = (ValueError, IndexError, OverflowError, NotImplementedError, OSError)

_STATUS = re.compile(r"([A-Z_]+): ")
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)

_READ_AHEAD = 2**28  # bytes; the largest arrays come first, while most of the memory is still free


# Names


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns every leaf under its dotted name, such as `params.core.attention.query`.

    Args:
      tree: a pytree.
      prefix: the name of the tree itself.

    Raises:
      ValueError: two leaves have the same name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(part for part in (prefix, jax.tree_util.keystr(path, simple=True, separator=".")) if part)
        if name in named:
            raise ValueError(f"two arrays of the state are called {name!r}")
        named[name] = leaf

    return named


def unflatten(named: dict[str, Any], like: Any, prefix: str = "") -> Any:
    """Returns a tree with the structure of `like`; the inverse of `flatten`."""
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flatten(like, prefix)])


def below(named: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns the entries that belong to the tree `prefix`: those that `flatten(tree, prefix)` would name."""
    return {name: leaf for name, leaf in named.items() if not prefix or name == prefix or name.startswith(prefix + ".")}


# Reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """The pending reads of the shards of one array that this process needs. Replicas share a read."""

    target: jax.ShapeDtypeStruct
    sharding: jax.sharding.Sharding
    parts: dict[str, Any]

    def result(self) -> Array:
        """Waits for the shards and returns the array, placed on its devices."""
        return jax.make_array_from_callback(
            self.target.shape, self.sharding, lambda index: self.parts[repr(index)].result(), dtype=self.target.dtype
        ).block_until_ready()


def load_arrays(folder: epath.Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """Reads the named arrays below `folder` into the shardings of `targets`.

    Reads are issued ahead up to `_READ_AHEAD` bytes, largest arrays first.

    Args:
      folder: the folder of the arrays of one step.
      targets: shape, dtype and sharding of each array by name. An array without a sharding is placed on the first local
        device.

    Raises:
      DamagedError: an array is missing or altered, or has another shape or dtype.
      UnreadableError: the file system or the bucket refused to read it, or a file is a named pipe or a device.
      UserError: JAX cannot use the platform that JAX_PLATFORMS names.
    """
    require_platform()  # a missing platform must not be reported as damaged files
    if not in_bucket(folder):
        _check_regular_files(folder)

    context = ts.Context()
    opened = {name: ts.open(_spec(folder, name), open=True, read=True, context=context) for name in targets}
    waiting = collections.deque(sorted(targets, key=lambda name: _bytes(targets[name]), reverse=True))
    reads: dict[str, _Read] = {}
    arrays: dict[str, Array] = {}

    while waiting or reads:
        # The next read starts only while less than `_READ_AHEAD` bytes are pending, which bounds host memory.
        while waiting and (not reads or sum(_bytes(read.target) for read in reads.values()) < _READ_AHEAD):
            with _naming(waiting[0]):
                reads[waiting[0]] = _start(opened[waiting[0]].result(), targets[waiting[0]])
            waiting.popleft()

        first = next(iter(reads))
        with _naming(first):
            arrays[first] = reads.pop(first).result()  # popping the read frees its host buffers

    return {name: arrays[name] for name in targets}


def _check_regular_files(folder: str | os.PathLike[str]) -> None:
    """Raises UnreadableError if `folder` contains a pipe or a device, for which TensorStore would wait forever."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError:
        return  # TensorStore reports the reason when it opens the array

    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            _check_regular_files(entry.path)
        elif not entry.is_file(follow_symlinks=False):
            try:
                check_regular(entry.path)
            except UserError as error:
                raise UnreadableError(str(error)) from None


def _bytes(target: jax.ShapeDtypeStruct) -> int:
    """Returns the size of the array in bytes."""
    return math.prod(target.shape) * target.dtype.itemsize


def _spec(folder: epath.Path, name: str) -> dict[str, Any]:
    """Returns the TensorStore specification of the array `name`."""
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": kvstore(folder), "path": f"{name}/"}}


def _start(store: ts.TensorStore, target: jax.ShapeDtypeStruct) -> _Read:
    """Starts one read per distinct shard of this process. Raises DamagedError if shape or dtype differ."""
    if store.shape != target.shape or store.dtype.numpy_dtype != target.dtype:
        raise DamagedError(f"it is {store.dtype.name}{list(store.shape)}")

    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # Devices that hold replicas have equal indices, so each shard is read once.
    indices = {repr(index): index for index in sharding.addressable_devices_indices_map(target.shape).values()}
    parts = {key: store[index].read() for key, index in indices.items()}
    return _Read(target=target, sharding=sharding, parts=parts)


# Errors


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Converts errors of TensorStore to DamagedError or RefusedError that name the array.

    TensorStore raises exceptions of many types. Only their messages distinguish damaged files from a file system that
    refuses access.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        # Out of memory, on the host or a device, is independent of the files.
        raise
    except DamagedError as error:
        raise DamagedError(f"array {name} cannot be read ({error})") from error
    except _ERRORS_OF_TENSORSTORE as error:
        refused = _refusal(error)
        if refused is not None:
            raise RefusedError(f"array {name} cannot be read ({refused})") from error
        raise DamagedError(f"array {name} cannot be read ({brief(error)})") from error


def _refusal(error: Exception) -> str | None:
    """Returns why the file system or the bucket refused a read, or None if the files themselves are wrong."""
    # A missing file is damage. Other errors of the operating system are refusals.
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error.strerror or brief(error)

    code = OS_ERROR.search(str(error))
    if code is not None:
        return None if int(code[1]) in _NO_FILE else os.strerror(int(code[1]))

    status = _STATUS.match(str(error))
    return None if status is None or status[1] in _FOUND_IN_FILES else brief(error)
