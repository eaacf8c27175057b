"""Restores the latest valid step. Steps that are damaged or of another version are reported and skipped."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from looplm_jax.checkpoints._arrays import below, flatten, unflatten
from looplm_jax.checkpoints._metadata import (
    ArrayInfo,
    DamagedError,
    Metadata,
    MetadataFile,
    OtherVersionError,
    RefusedError,
    UnreadableError,
)
from looplm_jax.checkpoints._paths import checkpoint_path
from looplm_jax.checkpoints._step import StepFolder, list_steps, read_arrays, read_metadata_file
from looplm_jax.errors import UserError, at_most
from looplm_jax.files import report_failed_reads, with_retries

# Differing arrays that a message lists. A model of another shape differs in all of them.
_SHOWN = 3

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippedStep:
    """A step that was skipped because it is damaged, or because another version of this package wrote it.

    Attributes:
      step: the number of the step.
      why: the damaged part, or the format of the other version.
      other_version: whether the step is complete but of another version.
    """

    step: int
    why: str
    other_version: bool = False

    def __str__(self) -> str:
        return f"step {self.step} {self.why}" if self.other_version else f"step {self.step} is damaged: {self.why}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A restored state.

    Attributes:
      step: the number of the step.
      state: the state, as a pytree of arrays.
      metadata: the metadata of the step.
      skipped: the newer steps that were skipped, newest first.
    """

    step: int
    state: Any
    metadata: Metadata
    skipped: tuple[SkippedStep, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LatestValid(Generic[T]):
    """The value that was read from the latest valid step, and the newer steps that were skipped."""

    value: T
    skipped: tuple[SkippedStep, ...]


# Restoring


def read_metadata(path: str, step: int | None = None) -> Metadata:
    """Returns the metadata of `step` or of the latest step with valid metadata. No array is read.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: the number of the step. None selects the latest.

    Raises:
      UserError: `path` is not a checkpoint, or no step is valid.
    """
    return latest_valid(find_steps(path, step), read_metadata_file).value.metadata


def restore_params(
    path: str,
    abstract_params: Any,
    *,
    step: int | None = None,
    prefix: str = "params",
    dtype: DTypeLike | None = None,
    uncast: Sequence[str] = (),
) -> Restored:
    """Restores one part of a saved state, by default `params`. The rest is not read.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      abstract_params: the part as a tree of `jax.ShapeDtypeStruct` with shardings. Its dtypes are ignored.
      step: the number of the step. None selects the latest valid step.
      prefix: the name of the part in the state.
      dtype: the dtype to which floating-point arrays are cast. None keeps the stored dtypes.
      uncast: top-level groups of the part that keep their stored dtypes whatever `dtype` is.

    Raises:
      UserError: `path` is not a checkpoint, no step is valid, or the part consists of other arrays than requested.
    """

    def describe(saved: MetadataFile) -> Any:
        # Requested as stored, so that the comparison below is of names and shapes alone. The cast comes after the
        # digests.
        wanted = flatten(abstract_params, prefix)
        stored = {name: _as_stored(target, saved.arrays.get(name)) for name, target in wanted.items()}
        return unflatten(stored, abstract_params, prefix)

    groups = [f"{prefix}.{group}" for group in uncast]
    return restore(find_steps(path, step), describe, prefix=prefix, dtype=dtype, uncast=groups)


# Selecting a step


def find_steps(path: str, step: int | None = None) -> list[StepFolder]:
    """Returns the step folders that a path given by a user refers to, newest first.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: the only step to return. None returns all.

    Raises:
      UserError: there is none.
    """
    given = checkpoint_path(path)
    with report_failed_reads(given):
        # In order of preference: a run folder, its `checkpoints` folder, one step.
        nested = list_steps(given / "checkpoints") or list_steps(given)
        folders = nested or [found for found in list_steps(given.parent) if found.path == given]

    if not folders:
        raise UserError(f"{path} is not a checkpoint: expected a run folder with checkpoints/<step>, or one such step")

    chosen = [found for found in reversed(folders) if step in (None, found.step)]
    if not chosen:
        known = ", ".join(str(found.step) for found in folders if found.committed)
        raise UserError(f"{path} holds no step {step}; it holds {known or 'none that was finished'}")
    return chosen


def latest_valid(folders: Sequence[StepFolder], read: Callable[[StepFolder], T]) -> _LatestValid[T]:
    """Returns the value of `read` for the first folder that is valid, and the folders skipped before it.

    Refused reads are retried. A step that is still unreadable is not skipped: it may be intact, and an older step would
    lose work.

    Raises:
      UserError: no folder is valid, or a read is refused.
    """
    skipped: list[SkippedStep] = []
    for folder in folders:
        try:
            return _LatestValid(value=with_retries(lambda: read(folder), RefusedError), skipped=tuple(skipped))  # noqa: B023
        except DamagedError as error:
            # The files themselves show the damage, so that reading again would not help.
            skipped.append(SkippedStep(step=folder.step, why=str(error)))
        except OtherVersionError as error:
            skipped.append(SkippedStep(step=folder.step, why=str(error), other_version=True))
        except UnreadableError as error:
            raise UserError(
                f"{folder.path}: {error}; the step may be intact, and nothing was changed: try again, "
                "or move the folder elsewhere to use the step before"
            ) from None

    # Every folder was skipped, so each one has its reason in the message.
    reasons = "; ".join(str(step) for step in skipped)
    raise UserError(f"no valid checkpoint in {folders[0].path.parent}: {reasons}; {_remedy(skipped)}")


def _remedy(skipped: Sequence[SkippedStep]) -> str:
    # The other version can still read the step, which is better than a new run.
    if any(step.other_version for step in skipped):
        return "install the version of looplm_jax that wrote it"
    return "restore a copy, or start a new run"


def restore(
    folders: Sequence[StepFolder],
    describe: Callable[[MetadataFile], Any],
    *,
    prefix: str = "",
    dtype: DTypeLike | None = None,
    uncast: Sequence[str] = (),
) -> Restored:
    """Restores the latest valid state among `folders`, with every array checked against its digest.

    Args:
      folders: the steps to try, newest first.
      describe: returns the abstract state, a tree of `jax.ShapeDtypeStruct`, for the metadata file of a step.
      prefix: the name of the part of the state to restore. The empty string restores all of it.
      dtype: the dtype to which floating-point arrays are cast. None keeps the stored dtypes.
      uncast: full names of groups that keep their stored dtypes.

    Raises:
      UserError: no step is valid, or the state consists of other arrays.
    """

    def read(folder: StepFolder) -> Restored:
        saved = read_metadata_file(folder)
        abstract = describe(saved)
        targets, records = flatten(abstract, prefix), below(saved.arrays, prefix)
        # Checked before any array is read.
        _require_same_arrays(folder, records, targets)

        arrays = read_arrays(folder, targets, records)
        if dtype is not None:
            _cast_each(arrays, dtype, uncast)

        state = unflatten(arrays, abstract, prefix)
        return Restored(step=folder.step, state=state, metadata=saved.metadata, skipped=())

    found = latest_valid(folders, read)
    return dataclasses.replace(found.value, skipped=found.skipped)


# Arrays


def _as_stored(target: jax.ShapeDtypeStruct, record: ArrayInfo | None) -> jax.ShapeDtypeStruct:
    """Returns `target` with the stored dtype."""
    return target if record is None else target.update(dtype=jnp.dtype(record.dtype))


def _cast_each(arrays: dict[str, Array], dtype: DTypeLike, uncast: Sequence[str]) -> None:
    """Casts the values of the dictionary in place, so that each array is freed before the next is cast."""
    kept = {name for group in uncast for name in below(arrays, group)}
    for name in arrays.keys() - kept:
        # Counters and random keys are integers.
        if jnp.issubdtype(arrays[name].dtype, jnp.floating):
            arrays[name] = arrays[name].astype(dtype)


def _require_same_arrays(folder: StepFolder, saved: dict[str, ArrayInfo], wanted: dict[str, Any]) -> None:
    """Raises UserError if names, shapes or dtypes of the saved and the requested arrays differ."""
    # Compared as text, which is what the message shows: dtype and shape, without the digest.
    have = {name: str(record) for name, record in saved.items()}
    want = {name: str(ArrayInfo(shape=x.shape, dtype=str(x.dtype), digest="")) for name, x in wanted.items()}

    differing = [
        f"{name}: {have.get(name, 'missing')} there, {want.get(name, 'nothing')} wanted"
        for name in {**want, **have}
        if have.get(name) != want.get(name)
    ]

    if differing:
        raise UserError(f"{folder.path} holds another state: {at_most(differing, _SHOWN, '; ')}")
