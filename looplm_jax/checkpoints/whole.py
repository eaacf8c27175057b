"""A step as a plain dictionary of arrays by name, for what needs no tree: read whole, and written whole."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath
from jaxtyping import Array

from looplm_jax.checkpoints.failed_save import late_reports_silenced, remove_failed
from looplm_jax.checkpoints.metadata import ArrayRecord, Metadata
from looplm_jax.checkpoints.paths import checkpoint_path
from looplm_jax.checkpoints.reading import DamagedStep, candidates, newest_good
from looplm_jax.checkpoints.step import StepFolder, read_arrays, read_sidecar, start_writing, write_failure
from looplm_jax.errors import UserError
from looplm_jax.files import NO_SPACE


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeStep:
    """Everything that one step holds, and the newer steps that were passed over, newest first."""

    step: int
    arrays: dict[str, Array]
    metadata: Metadata
    damaged: tuple[DamagedStep, ...] = ()


def read_whole(path: str | os.PathLike[str], *, step: int | None = None) -> WholeStep:
    """All arrays of the newest good step, each checked against its digest, on the first device.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: the step; None means the newest good one.

    Raises:
      UserError: `path` is not a checkpoint, or no step is good.
    """
    found = newest_good(candidates(os.fspath(path), step), _read)
    return dataclasses.replace(found.value, damaged=found.damaged)


def read_records(path: str | os.PathLike[str], *, step: int | None = None) -> dict[str, ArrayRecord]:
    """Shape and dtype of all arrays of the newest step whose metadata is good, or of `step`; no array is read.

    Raises:
      UserError: `path` is not a checkpoint, or no step is good.
    """
    return newest_good(candidates(os.fspath(path), step), read_sidecar).value.arrays


def write_whole(folder: Path, whole: WholeStep) -> None:
    """Writes `<folder>/checkpoints/<step>`, and waits until it is committed; it is never deleted as an old one.

    Raises:
      UserError: the disk refused it. Nothing of it remains that the disk lets go.
    """
    path = checkpoint_path(folder) / "checkpoints" / str(whole.step)
    with late_reports_silenced():
        reason = _write(path, whole)
        if reason is not None:
            remove_failed(path.parent, whole.step)
    if reason is not None:
        remedy = "free space" if reason == NO_SPACE else "mend that"
        raise UserError(f"{reason} while writing {path}: {remedy} and run the same command again")


def _write(path: epath.Path, whole: WholeStep) -> str | None:
    """Why the disk refused, or None where all is written; the exception, which keeps alive what failed, is gone."""
    try:
        start_writing(path, whole.arrays, whole.metadata, permanent=True, compressed=False).result()
    except Exception as error:
        reason = write_failure(error, path)
        if reason is None:
            raise
        return reason
    return None


def _read(folder: StepFolder) -> WholeStep:
    sidecar = read_sidecar(folder)
    targets = {
        name: jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype)) for name, record in sidecar.arrays.items()
    }
    arrays = read_arrays(folder, targets, sidecar.arrays)
    return WholeStep(step=folder.step, arrays=arrays, metadata=sidecar.metadata)
