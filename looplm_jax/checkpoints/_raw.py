"""Reads and writes a step as a flat dictionary of arrays, for code that needs no pytree."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array

from looplm_jax.checkpoints._metadata import ArrayInfo, Metadata
from looplm_jax.checkpoints._paths import checkpoint_path
from looplm_jax.checkpoints._restore import SkippedStep, find_steps, latest_valid
from looplm_jax.checkpoints._step import StepFolder, read_arrays, read_metadata_file, start_write, write_failure
from looplm_jax.checkpoints._store import late_reports_silenced, remove_failed
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawStep:
    """The complete contents of one step.

    Attributes:
      step: the number of the step.
      arrays: every array by its dotted name.
      metadata: the metadata of the step.
      skipped: the newer steps that were skipped, newest first.
    """

    step: int
    arrays: dict[str, Array]
    metadata: Metadata
    skipped: tuple[SkippedStep, ...] = ()


def read_raw(path: str | os.PathLike[str], *, step: int | None = None) -> RawStep:
    """Reads all arrays of the latest valid step onto the first device and checks each against its digest.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: the number of the step. None selects the latest valid step.

    Raises:
      UserError: `path` is not a checkpoint, or no step is valid.
    """
    found = latest_valid(find_steps(os.fspath(path), step), _read)
    return dataclasses.replace(found.value, skipped=found.skipped)


def read_array_info(path: str | os.PathLike[str], *, step: int | None = None) -> dict[str, ArrayInfo]:
    """Returns shape, dtype and digest of the arrays of `step`, or of the latest step with valid metadata.

    Reads no array.

    Raises:
      UserError: `path` is not a checkpoint, or no step is valid.
    """
    return latest_valid(find_steps(os.fspath(path), step), read_metadata_file).value.arrays


def write_raw(folder: Path, whole: RawStep) -> None:
    """Writes `<folder>/checkpoints/<step>` and waits until it is committed. The step is exempt from pruning.

    Raises:
      UserError: the file system refused the write. The partial files are removed as far as the file system permits.
    """
    path = checkpoint_path(folder) / "checkpoints" / str(whole.step)
    with late_reports_silenced():
        reason = _write(path, whole)
        if reason is not None:
            remove_failed(path.parent, whole.step)

    # Raised outside the context, so that the error reaches the user and only the late reports of Orbax are silenced.
    if reason is not None:
        remedy = "free space" if reason == NO_SPACE else "fix that"
        raise UserError(f"{reason} while writing {path}: {remedy} and run the same command again")


def _write(path: epath.Path, whole: RawStep) -> str | None:
    """Writes the step. Returns None on success, or the reason why the file system refused it.

    The exception is dropped because it would keep the failed arrays alive.
    """
    try:
        # Uncompressed, because compression may need as much memory again as the arrays.
        start_write(path, whole.arrays, whole.metadata, permanent=True, compressed=False).result()
    except Exception as error:
        reason = write_failure(error, path)
        if reason is None:
            raise
        return reason
    return None


def _read(folder: StepFolder) -> RawStep:
    """Reads the arrays and the metadata of one step."""
    saved = read_metadata_file(folder)
    # No sharding is given: the arrays are read onto the first device.
    targets = {
        name: jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype)) for name, record in saved.arrays.items()
    }

    arrays = read_arrays(folder, targets, saved.arrays)
    return RawStep(step=folder.step, arrays=arrays, metadata=saved.metadata)
