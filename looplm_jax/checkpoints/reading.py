"""The latest valid step: one that is damaged, or of another version, is named and passed over."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from looplm_jax.checkpoints.errors import DamagedError, OtherVersionError, RefusedError, UnreadableError
from looplm_jax.checkpoints.metadata import ArrayRecord, Metadata, Sidecar
from looplm_jax.checkpoints.paths import checkpoint_path
from looplm_jax.checkpoints.step import StepFolder, list_steps, read_arrays, read_sidecar
from looplm_jax.checkpoints.tree import below, flatten, unflatten
from looplm_jax.errors import UserError
from looplm_jax.files import reading, retried

_SHOWN = 3

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DamagedStep:
    """A step that was passed over: which part of it is damaged, or that it is whole and of another version."""

    step: int
    why: str
    other_version: bool = False

    def __str__(self) -> str:
        return f"step {self.step} {self.why}" if self.other_version else f"step {self.step} is damaged: {self.why}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A state as it was saved, and the newer steps that were passed over, newest first."""

    step: int
    state: Any
    metadata: Metadata
    damaged: tuple[DamagedStep, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found(Generic[T]):
    """What was read from the newest good step."""

    value: T
    damaged: tuple[DamagedStep, ...]


def read_metadata(path: str, step: int | None = None) -> Metadata:
    """The metadata of `step`, or of the newest step whose metadata is good, without its arrays.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: the step; None means the newest.

    Raises:
      UserError: `path` is not a checkpoint, or no step is good.
    """
    return newest_good(candidates(path, step), read_sidecar).value.metadata


def restore_params(
    path: str,
    abstract_params: Any,
    *,
    step: int | None = None,
    prefix: str = "params",
    dtype: DTypeLike | None = None,
    uncast: Sequence[str] = (),
) -> Restored:
    """One part of a saved state, `params` if not told otherwise; the rest is not read.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      abstract_params: the part as a tree of `jax.ShapeDtypeStruct` with shardings; its dtypes do not matter.
      step: the step; None means the newest good one.
      prefix: the name of the part in the state.
      dtype: what arrays of floating-point numbers are cast to; None: they stay as they are stored.
      uncast: top-level groups of the part that stay as they are stored whatever `dtype` is.

    Raises:
      UserError: `path` is not a checkpoint, no step is good, or the part has other arrays than asked for.
    """

    def describe(sidecar: Sidecar) -> Any:
        wanted = flatten(abstract_params, prefix)
        stored = {name: _as_stored(target, sidecar.arrays.get(name)) for name, target in wanted.items()}
        return unflatten(stored, abstract_params, prefix)

    groups = [f"{prefix}.{group}" for group in uncast]
    return restore(candidates(path, step), describe, prefix=prefix, dtype=dtype, uncast=groups)


def candidates(path: str, step: int | None = None) -> list[StepFolder]:
    """The step folders that a path given by a user means, newest first.

    Raises:
      UserError: there is none.
    """
    given = checkpoint_path(path)
    with reading(given):
        nested = list_steps(given / "checkpoints") or list_steps(given)
        folders = nested or [found for found in list_steps(given.parent) if found.path == given]
    if not folders:
        raise UserError(f"{path} is not a checkpoint: expected a run folder with checkpoints/<step>, or one such step")
    chosen = [found for found in reversed(folders) if step in (None, found.step)]
    if not chosen:
        known = ", ".join(str(found.step) for found in folders if found.committed)
        raise UserError(f"{path} holds no step {step}; it holds {known or 'none that was finished'}")
    return chosen


def newest_good(folders: Sequence[StepFolder], read: Callable[[StepFolder], T]) -> Found[T]:
    """What `read` returns for the first folder that it finds undamaged.

    Reads that the disk or the bucket refuses are tried again. A step that still cannot be read is not skipped: nothing
    says that it is damaged, and an older one would lose work.

    Raises:
      UserError: there is none, or the disk refuses one.
    """
    passed_over: list[DamagedStep] = []
    for folder in folders:
        try:
            return Found(value=retried(lambda: read(folder), RefusedError), damaged=tuple(passed_over))  # noqa: B023
        except DamagedError as error:
            passed_over.append(DamagedStep(step=folder.step, why=str(error)))
        except OtherVersionError as error:
            passed_over.append(DamagedStep(step=folder.step, why=str(error), other_version=True))
        except UnreadableError as error:
            raise UserError(
                f"{folder.path}: {error}; nothing says that this step is damaged and nothing was changed: try again, "
                "or move the folder elsewhere to use the step before"
            ) from None
    reasons = "; ".join(str(step) for step in passed_over)
    raise UserError(f"no good checkpoint in {folders[0].path.parent}: {reasons}; {_remedy(passed_over)}")


def _remedy(passed_over: Sequence[DamagedStep]) -> str:
    if any(step.other_version for step in passed_over):
        return "install the version of looplm_jax that wrote it"
    return "restore a copy, or start anew"


def restore(
    folders: Sequence[StepFolder],
    describe: Callable[[Sidecar], Any],
    *,
    prefix: str = "",
    dtype: DTypeLike | None = None,
    uncast: Sequence[str] = (),
) -> Restored:
    """The newest good state among `folders`, or its part `prefix`, as the tree that `describe` makes of its sidecar.

    Arrays of floating-point numbers are cast to `dtype` where one is given, but for those below a name in `uncast`.

    Raises:
      UserError: no step is good, or the state has other arrays.
    """

    def read(folder: StepFolder) -> Restored:
        sidecar = read_sidecar(folder)
        abstract = describe(sidecar)
        targets, records = flatten(abstract, prefix), below(sidecar.arrays, prefix)
        _require_same_arrays(folder, records, targets)
        arrays = read_arrays(folder, targets, records)
        if dtype is not None:
            _cast_each(arrays, dtype, uncast)
        state = unflatten(arrays, abstract, prefix)
        return Restored(step=folder.step, state=state, metadata=sidecar.metadata, damaged=())

    found = newest_good(folders, read)
    return dataclasses.replace(found.value, damaged=found.damaged)


def _as_stored(target: jax.ShapeDtypeStruct, record: ArrayRecord | None) -> jax.ShapeDtypeStruct:
    return target if record is None else target.update(dtype=jnp.dtype(record.dtype))


def _cast_each(arrays: dict[str, Array], dtype: DTypeLike, uncast: Sequence[str]) -> None:
    """Casts in place of the dictionary's own values: each array is freed before the next is cast."""
    kept = {name for group in uncast for name in below(arrays, group)}
    for name in arrays.keys() - kept:
        if jnp.issubdtype(arrays[name].dtype, jnp.floating):
            arrays[name] = arrays[name].astype(dtype)


def _require_same_arrays(folder: StepFolder, saved: dict[str, ArrayRecord], wanted: dict[str, Any]) -> None:
    have = {name: str(record) for name, record in saved.items()}
    want = {name: str(ArrayRecord(shape=x.shape, dtype=str(x.dtype), digest="")) for name, x in wanted.items()}
    differing = [
        f"{name}: {have.get(name, 'missing')} there, {want.get(name, 'nothing')} wanted"
        for name in {**want, **have}
        if have.get(name) != want.get(name)
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UserError(f"{folder.path} holds another state: {'; '.join(differing[:_SHOWN])}{more}")
