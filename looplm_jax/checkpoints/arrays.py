"""The arrays of a step, read straight from the TensorStore files that Orbax writes (OCDBT, zarr version 3).

Orbax itself reads through an event loop: a damaged array leaves the other reads behind on a closed loop, which then
print tracebacks from their threads. Here each read is a future of its own, and each error has a name.
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

from looplm_jax.checkpoints.errors import DamagedError, RefusedError, UnreadableError, brief
from looplm_jax.checkpoints.paths import kvstore
from looplm_jax.errors import UserError
from looplm_jax.files import check_regular, in_bucket
from looplm_jax.sharding.platform import require_platform

OS_ERROR = re.compile(r"(?:os_error_code='|OS error )(\d+)")  # in the messages of TensorStore

# How TensorStore names what it finds wrong in files; whatever else it says is about the way to them.
_FOUND_IN_FILES = ("DATA_LOSS", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "UNIMPLEMENTED")
_ERRORS_OF_TENSORSTORE = (ValueError, IndexError, OverflowError, NotImplementedError, OSError)
_STATUS = re.compile(r"([A-Z_]+): ")
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_READ_AHEAD = 2**28  # bytes; the largest arrays come first, so that the rest of memory is still free


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """The parts of one array that this process needs, being read; replicas share a part."""

    target: jax.ShapeDtypeStruct
    sharding: jax.sharding.Sharding
    parts: dict[str, Any]

    def result(self) -> Array:
        """The array, once its parts are there and on the devices."""
        return jax.make_array_from_callback(
            self.target.shape, self.sharding, lambda index: self.parts[repr(index)].result(), dtype=self.target.dtype
        ).block_until_ready()


def load(folder: epath.Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """The named arrays below `folder`, in the shardings of `targets`; without one, on the first device.

    Raises:
      DamagedError: an array is missing, altered, or of another shape or dtype.
      UnreadableError: the disk or the bucket refused to give it, or a file is a named pipe or a device.
      UserError: JAX cannot use the platform that JAX_PLATFORMS names.
    """
    require_platform()  # one that is not here is no fault of the files
    if not in_bucket(folder):
        _check_regular_files(folder)
    context = ts.Context()
    opened = {name: ts.open(_spec(folder, name), open=True, read=True, context=context) for name in targets}
    waiting = collections.deque(sorted(targets, key=lambda name: _bytes(targets[name]), reverse=True))
    reads: dict[str, _Read] = {}
    arrays: dict[str, Array] = {}
    while waiting or reads:
        while waiting and (not reads or sum(_bytes(read.target) for read in reads.values()) < _READ_AHEAD):
            with _naming(waiting[0]):
                reads[waiting[0]] = _start(opened[waiting[0]].result(), targets[waiting[0]])
            waiting.popleft()
        first = next(iter(reads))
        with _naming(first):
            arrays[first] = reads.pop(first).result()  # and with it the parts that were read
    return {name: arrays[name] for name in targets}


def _check_regular_files(folder: str | os.PathLike[str]) -> None:
    """Raises UnreadableError where there is a named pipe or a device, for which TensorStore would wait forever."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError:
        return  # TensorStore says why
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            _check_regular_files(entry.path)
        elif not entry.is_file(follow_symlinks=False):
            try:
                check_regular(entry.path)
            except UserError as error:
                raise UnreadableError(str(error)) from None


def _bytes(target: jax.ShapeDtypeStruct) -> int:
    return math.prod(target.shape) * target.dtype.itemsize


def _spec(folder: epath.Path, name: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": kvstore(folder), "path": f"{name}/"}}


def _start(store: ts.TensorStore, target: jax.ShapeDtypeStruct) -> _Read:
    if store.shape != target.shape or store.dtype.numpy_dtype != target.dtype:
        raise DamagedError(f"it is {store.dtype.name}{list(store.shape)}")
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    indices = {repr(index): index for index in sharding.addressable_devices_indices_map(target.shape).values()}
    parts = {key: store[index].read() for key, index in indices.items()}
    return _Read(target=target, sharding=sharding, parts=parts)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """TensorStore raises errors of many kinds; only their messages tell damaged files from a disk that refuses."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except DamagedError as error:
        raise DamagedError(f"array {name} cannot be read ({error})") from error
    except _ERRORS_OF_TENSORSTORE as error:
        refused = _refusal(error)
        if refused is not None:
            raise RefusedError(f"array {name} cannot be read ({refused})") from error
        raise DamagedError(f"array {name} cannot be read ({brief(error)})") from error


def _refusal(error: Exception) -> str | None:
    """Why the disk or the bucket refused to give a file, or None if it gave what is wrong."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error.strerror or brief(error)
    code = OS_ERROR.search(str(error))
    if code is not None:
        return None if int(code[1]) in _NO_FILE else os.strerror(int(code[1]))
    status = _STATUS.match(str(error))
    return None if status is None or status[1] in _FOUND_IN_FILES else brief(error)
