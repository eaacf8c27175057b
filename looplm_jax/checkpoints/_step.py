"""One step on disk: written atomically, and read with every array checked against its digest.

This is the only module that imports Orbax.
"""

import dataclasses
import errno
import itertools
import json
import logging
import os
import re
import stat
from typing import TYPE_CHECKING

import jax
from etils import epath
from jaxtyping import Array

from looplm_jax.checkpoints._arrays import OS_ERROR, load_arrays
from looplm_jax.checkpoints._digest import digests
from looplm_jax.checkpoints._metadata import (
    ArrayInfo,
    DamagedError,
    Metadata,
    MetadataFile,
    RefusedError,
    UnreadableError,
    decode_metadata,
    encode_metadata,
)
from looplm_jax.errors import UserError, at_most, brief
from looplm_jax.files import NO_SPACE, check_regular, forget_listing, in_bucket, refusal, with_retries

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

_ARRAYS = "state"
_METADATA = "sidecar"  # the name on disk
_METADATA_FILE = "data.json"
_COMMITTED = "commit_success.txt"
# The suffix is that of a folder that Orbax has not committed yet.
_STEP_NAME = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFolder:
    """A folder that contains a step, or the remains of an attempt to write one.

    Attributes:
      step: the number of the step.
      path: the folder.
      committed: whether the step was written completely.
    """

    step: int
    path: epath.Path
    committed: bool


class LostFolderError(FileNotFoundError):
    """The folder of the steps was moved or removed during a save."""


class AsyncWrite:
    """A step that is being written asynchronously.

    Args:
      response: what Orbax returned for the save.
      folder: the folder of all steps.
    """

    def __init__(self, response: "ocp.AsyncResponse[None]", folder: epath.Path):
        self._response, self._folder = response, folder
        # An open folder keeps its inode number, so that a folder that replaces it has another one.
        self._opened = None if in_bucket(folder) else os.open(folder, os.O_RDONLY)

    def result(self) -> None:
        """Waits for the commit and raises the error of a failed save. Must be called once.

        After an error the log filter stays, because threads of Orbax may log the same error for a while.

        Raises:
          LostFolderError: the save failed, and the folder of the steps was moved or removed meanwhile.
        """
        try:
            self._response.result()
        except Exception as error:
            # Orbax then raises errors of many types, such as a ValueError about missing metadata.
            if not self._is_lost():
                raise
            raise LostFolderError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(self._folder)) from error
        finally:
            if self._opened is not None:
                os.close(self._opened)
        logging.getLogger("absl").removeFilter(_is_not_repeated)

    def _is_lost(self) -> bool:
        try:
            return self._opened is not None and not os.path.samestat(os.stat(self._folder), os.fstat(self._opened))
        except (FileNotFoundError, NotADirectoryError):
            return True


# Listing


def list_steps(folder: epath.Path) -> list[StepFolder]:
    """Returns every step folder below `folder`, oldest first. Each call reads the file system or the bucket.

    A folder that does not exist contains no steps.

    Raises:
      OSError: the file system still refuses to list the folder after the retries.
    """
    return with_retries(lambda: _list_steps(folder))


def _list_steps(folder: epath.Path) -> list[StepFolder]:
    """Lists the steps once, without retries."""
    forget_listing(folder)
    found = [(entry, _STEP_NAME.fullmatch(entry.name)) for entry in _entries(folder)]
    steps = [
        StepFolder(step=int(match[1]), path=entry, committed=match[2] is None and _is_there(entry / _COMMITTED))
        for entry, match in found
        if match and _is_folder(entry)
    ]
    # Of two folders with the same number, the committed one comes last.
    return sorted(steps, key=lambda step: (step.step, step.committed))


def _entries(folder: epath.Path) -> list[epath.Path]:
    """Returns the entries of a folder, or none if it does not exist."""
    if in_bucket(folder) and not folder.is_dir():
        return []
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(path: epath.Path) -> bool:
    return path.is_dir() if in_bucket(path) else _mode(path) == stat.S_IFDIR


def _is_there(path: epath.Path) -> bool:
    return path.exists() if in_bucket(path) else _mode(path) is not None


def _mode(path: epath.Path) -> int | None:
    """Returns the type of a file, or None if it does not exist.

    `exists` and `is_dir` would report a file that the file system refuses to read as missing.
    """
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


# Writing


def start_write(
    path: epath.Path, arrays: dict[str, Array], metadata: Metadata, *, permanent: bool, compressed: bool = True
) -> AsyncWrite:
    """Starts to write a step and replaces what is at `path`. Once this returns, the arrays may be donated.

    A symbolic link at `path` is replaced; its target is not modified.

    Args:
      path: the folder of the step.
      arrays: the arrays by name.
      metadata: the metadata to commit with them.
      permanent: whether the step is exempt from pruning.
      compressed: whether to compress the arrays. Compression needs up to as much additional memory as the arrays;
        without it they are written from their own buffers.
    """
    from orbax.checkpoint import v1 as ocp  # takes long to import, and commands that only read do not need it

    # The digests are computed here and not in the background, because the caller may donate the arrays afterwards.
    found = digests(arrays)
    records = {
        name: ArrayInfo(shape=array.shape, dtype=str(array.dtype), digest=found[name]) for name, array in arrays.items()
    }

    encoded = encode_metadata(metadata, records, permanent=permanent)
    if _is_link(path) and jax.process_index() == 0:
        path.unlink()

    # Errors are reported once, by `AsyncWrite.result`.
    logging.getLogger("absl").addFilter(_is_not_repeated)
    with _context(compressed):
        response = ocp.save_checkpointables_async(path, {_ARRAYS: arrays, _METADATA: encoded}, overwrite=True)
    return AsyncWrite(response, path.parent)


# Reading


def read_metadata_file(folder: StepFolder) -> MetadataFile:
    """Returns the metadata of a step, checked against its checksum.

    Raises:
      DamagedError: the step was not finished, or its metadata is missing or altered.
      OtherVersionError: its metadata is of another version.
      UnreadableError: the file system or the bucket refused the read, or the file is a named pipe or a device.
    """
    if not folder.committed:
        raise DamagedError("it was not finished")

    path = folder.path / _METADATA / _METADATA_FILE
    try:
        # Reading a named pipe would block forever.
        check_regular(path)
        value = json.loads(path.read_bytes())
    except UserError as error:
        raise UnreadableError(str(error)) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError) as error:
        raise DamagedError(f"{_METADATA}/{_METADATA_FILE} cannot be read ({brief(error)})") from error
    except Exception as error:
        refused = refusal(error, path)
        if refused is None:
            raise
        raise RefusedError(f"{_METADATA}/{_METADATA_FILE} cannot be read ({refused})") from error

    return decode_metadata(value)


def read_arrays(
    folder: StepFolder, targets: dict[str, jax.ShapeDtypeStruct], records: dict[str, ArrayInfo]
) -> dict[str, Array]:
    """Reads the named arrays of a step into the shardings of `targets` and checks each against its digest.

    Raises:
      DamagedError: an array is missing or altered.
      UnreadableError: the file system or the bucket refused the read, or a file is a named pipe or a device.
    """
    # Digests are computed on the devices, after the transfer, so that damage on the way is noticed too.
    arrays = load_arrays(folder.path / _ARRAYS, targets)

    found = digests(arrays)
    altered = [name for name in targets if found[name] != records[name].digest]
    if altered:
        raise DamagedError(f"the digest of array {at_most(altered, 1)} differs")
    return arrays


# Deleting and renaming


def delete(folder: StepFolder) -> None:
    """Removes a step. Of a symbolic link, only the link is removed.

    The commit marker is removed first, so that a partly deleted step is never taken for a complete one.
    """
    if _is_link(folder.path):
        folder.path.unlink(missing_ok=True)
        return

    (folder.path / _COMMITTED).unlink(missing_ok=True)
    folder.path.rmtree(missing_ok=True)


def set_aside(folder: StepFolder) -> epath.Path:
    """Renames a step to a name that is not a step number, so that the user can keep it. Returns the new path."""
    names = {entry.name for entry in _entries(folder.path.parent)}
    # Earlier steps with this number may have been set aside, and are not replaced.
    number = next(number for number in itertools.count(1) if f"{folder.path.name}.set-aside-{number}" not in names)
    return folder.path.rename(folder.path.with_name(f"{folder.path.name}.set-aside-{number}"))


# Orbax and the file system


def write_failure(error: Exception, path: epath.Path) -> str | None:
    """Returns the reason why the file system or the bucket refused a write, or None if `error` is of another kind."""
    # TensorStore gives the error code of the operating system only in its message.
    in_text = OS_ERROR.search(str(error))
    code = int(in_text[1]) if in_text else getattr(error, "errno", None)

    if code in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    return refusal(error, path) if code is None else os.strerror(code)


def _is_link(path: epath.Path) -> bool:
    return not in_bucket(path) and os.path.islink(path)


def _is_not_repeated(record: logging.LogRecord) -> bool:
    """Whether a log record is not a repetition of a save error.

    Threads of Orbax log, with tracebacks, each error that `AsyncWrite.result` then raises.
    """
    return "raised an exception" not in record.getMessage()


def _context(compressed: bool) -> "ocp.Context":
    """Returns the Orbax configuration of a save."""
    from orbax.checkpoint import v1 as ocp

    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_METADATA)
    context = ocp.Context()
    context.checkpointables.registry = registry
    # With asynchronous creation, a file system that refuses to create the folders leaves threads waiting for minutes.
    context.async_options.create_directories_asynchronously = False
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = compressed
    return context
