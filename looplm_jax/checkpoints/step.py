"""One step on the disk, written as a whole or not at all, and read with every array checked.

No other module knows Orbax.
"""

import dataclasses
import errno
import itertools
import json
import logging
import os
import re
import stat

import jax
from etils import epath
from jaxtyping import Array
from orbax.checkpoint import v1 as ocp

from looplm_jax.checkpoints.arrays import OS_ERROR, load
from looplm_jax.checkpoints.digest import digests
from looplm_jax.checkpoints.errors import DamagedError, RefusedError, UnreadableError, brief
from looplm_jax.checkpoints.metadata import ArrayRecord, Metadata, Sidecar, decode, encode
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE, check_regular, forget_listing, in_bucket, refusal, retried

_ARRAYS = "state"
_SIDECAR = "sidecar"
_SIDECAR_FILE = "data.json"
_COMMITTED = "commit_success.txt"
_STEP_NAME = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFolder:
    """A folder that holds a step, or what is left of an attempt to write one."""

    step: int
    path: epath.Path
    committed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing:
    """A step that is being written in the background."""

    response: ocp.AsyncResponse[None]

    def result(self) -> None:
        """Waits for the commit; raises what went wrong, which other threads may echo for a while, unheard."""
        self.response.result()
        logging.getLogger("absl").removeFilter(_is_no_echo)


def list_steps(folder: epath.Path) -> list[StepFolder]:
    """Every step folder below `folder`, oldest first, read from the disk or the bucket at each call.

    Raises:
      OSError: the disk refuses to say, again and again. Only a folder that is not there holds no steps.
    """
    return retried(lambda: _list_steps(folder))


def _list_steps(folder: epath.Path) -> list[StepFolder]:
    forget_listing(folder)
    found = [(entry, _STEP_NAME.fullmatch(entry.name)) for entry in _entries(folder)]
    steps = [
        StepFolder(step=int(match[1]), path=entry, committed=match[2] is None and _is_there(entry / _COMMITTED))
        for entry, match in found
        if match and _is_folder(entry)
    ]
    return sorted(steps, key=lambda step: (step.step, step.committed))


def _entries(folder: epath.Path) -> list[epath.Path]:
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
    """The kind of a file, None where there is none. `exists` and `is_dir` call a file that the disk refuses missing."""
    try:
        return stat.S_IFMT(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def start_writing(
    path: epath.Path, arrays: dict[str, Array], metadata: Metadata, *, permanent: bool, compressed: bool = True
) -> Writing:
    """Starts to write a step, in place of what may be at `path`; once this returns, the arrays may be donated.

    A link at `path` is replaced, and what it points to is left as it is.

    Compression needs up to as much memory again as the arrays; without it they are written from where they are.
    """
    found = digests(arrays)
    records = {
        name: ArrayRecord(shape=array.shape, dtype=str(array.dtype), digest=found[name])
        for name, array in arrays.items()
    }
    sidecar = encode(metadata, records, permanent=permanent)
    if _is_link(path) and jax.process_index() == 0:
        path.unlink()
    logging.getLogger("absl").addFilter(_is_no_echo)
    with _context(compressed):
        response = ocp.save_checkpointables_async(path, {_ARRAYS: arrays, _SIDECAR: sidecar}, overwrite=True)
    return Writing(response=response)


def read_sidecar(folder: StepFolder) -> Sidecar:
    """The metadata of a step, checked against its checksum.

    Raises:
      DamagedError: the step was not finished, or its metadata is missing or altered.
      OtherVersionError: its metadata is of another version.
      UnreadableError: the disk or the bucket refused to give it, or it is a named pipe or a device.
    """
    if not folder.committed:
        raise DamagedError("it was not finished")
    path = folder.path / _SIDECAR / _SIDECAR_FILE
    try:
        check_regular(path)
        value = json.loads(path.read_bytes())
    except UserError as error:
        raise UnreadableError(str(error)) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError) as error:
        raise DamagedError(f"{_SIDECAR}/{_SIDECAR_FILE} cannot be read ({brief(error)})") from error
    except Exception as error:
        refused = refusal(error, path)
        if refused is None:
            raise
        raise RefusedError(f"{_SIDECAR}/{_SIDECAR_FILE} cannot be read ({refused})") from error
    return decode(value)


def read_arrays(
    folder: StepFolder, targets: dict[str, jax.ShapeDtypeStruct], records: dict[str, ArrayRecord]
) -> dict[str, Array]:
    """The named arrays of a step, in the shardings of `targets`, each checked against its digest.

    Raises:
      DamagedError: an array is missing or altered.
      UnreadableError: the disk or the bucket refused to give it, or it is a named pipe or a device.
    """
    arrays = load(folder.path / _ARRAYS, targets)
    found = digests(arrays)
    altered = [name for name in targets if found[name] != records[name].digest]
    if altered:
        more = f" and {len(altered) - 1} more" if len(altered) > 1 else ""
        raise DamagedError(f"the digest of array {altered[0]}{more} differs")
    return arrays


def delete(folder: StepFolder) -> None:
    """Removes a step. The mark of its commit goes first, so that a half-deleted step is never taken for a whole one.

    Of a link only the link itself is removed.
    """
    if _is_link(folder.path):
        folder.path.unlink(missing_ok=True)
        return
    (folder.path / _COMMITTED).unlink(missing_ok=True)
    folder.path.rmtree(missing_ok=True)


def set_aside(folder: StepFolder) -> epath.Path:
    """Gives a step a name that is no step's, where it stays for its user. Returns the new path."""
    names = {entry.name for entry in _entries(folder.path.parent)}
    number = next(number for number in itertools.count(1) if f"{folder.path.name}.set-aside-{number}" not in names)
    return folder.path.rename(folder.path.with_name(f"{folder.path.name}.set-aside-{number}"))


def write_failure(error: Exception, path: epath.Path) -> str | None:
    """Why the disk or the bucket refused a write, or None if `error` is of another kind."""
    in_text = OS_ERROR.search(str(error))
    code = int(in_text[1]) if in_text else getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    return refusal(error, path) if code is None else os.strerror(code)


def _is_link(path: epath.Path) -> bool:
    return not in_bucket(path) and os.path.islink(path)


def _is_no_echo(record: logging.LogRecord) -> bool:
    """The threads of Orbax log, with tracebacks, each error that `Writing.result` then raises."""
    return "raised an exception" not in record.getMessage()


def _context(compressed: bool) -> ocp.Context:
    """Folders are made before anything waits for them: else a disk that refuses leaves threads waiting for minutes."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_SIDECAR)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.async_options.create_directories_asynchronously = False
    context.array.saving.use_ocdbt = context.array.saving.use_zarr3 = True
    context.array.saving.use_compression = compressed
    return context
