"""Inspects a checkpoint: every step is read in full and checked against its digests."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from looplm_jax.checkpoints._arrays import below
from looplm_jax.checkpoints._metadata import (
    ArrayInfo,
    DamagedError,
    Metadata,
    MetadataFile,
    OtherVersionError,
    RefusedError,
    UnreadableError,
)
from looplm_jax.checkpoints._restore import find_steps
from looplm_jax.checkpoints._step import StepFolder, read_arrays, read_metadata_file
from looplm_jax.files import with_retries


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """The result of inspecting one step.

    Attributes:
      step: the number of the step.
      damage: the part that is damaged, or None.
      unknown: why the step could not be checked, or None: a read was refused, or another version wrote the step.
      permanent: whether the step is exempt from pruning.
      metadata: the metadata of the step, or None if it cannot be read.
      arrays: shape, dtype and digest of each array by name.

    `damage` and `unknown` are both None for a valid step.
    """

    step: int
    damage: str | None = None
    unknown: str | None = None
    permanent: bool = False
    metadata: Metadata | None = None
    arrays: dict[str, ArrayInfo] = dataclasses.field(default_factory=dict)

    @property
    def problem(self) -> str | None:
        """The problem of the step as the end of a sentence about it, or None."""
        return f"is damaged: {self.damage}" if self.damage else self.unknown

    @property
    def parameters(self) -> int:
        """The number of parameters: the elements of all arrays below `params`."""
        return sum(math.prod(record.shape) for record in below(self.arrays, "params").values())

    @property
    def bytes(self) -> int:
        """The size of all arrays in memory, in bytes."""
        return sum(math.prod(record.shape) * jnp.dtype(record.dtype).itemsize for record in self.arrays.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain JSON values, without the tokenizer."""
        metadata = dataclasses.asdict(self.metadata) if self.metadata else {}
        # Bytes are not JSON, and a tokenizer may have megabytes.
        metadata.pop("tokenizer", None)
        return {
            "step": self.step,
            "damage": self.damage,
            "unknown": self.unknown,
            "permanent": self.permanent,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "arrays": {name: str(record) for name, record in self.arrays.items()},
            **metadata,
        }


def inspect_steps(path: str, *, step: int | None = None) -> list[StepReport]:
    """Returns a report of each step, newest first. Arrays are read one at a time, onto the first device.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: the only step to inspect. None inspects all.

    Raises:
      UserError: `path` is not a checkpoint, or does not contain `step`.
    """
    # Unlike restoring, every step is reported, and none is an error.
    return [_inspect(folder) for folder in find_steps(path, step)]


def _inspect(folder: StepFolder) -> StepReport:
    """Returns the report of one step."""
    saved: MetadataFile | None = None
    damage = unknown = None

    try:
        saved = with_retries(lambda: read_metadata_file(folder), RefusedError)
        # Only one array is in memory at a time.
        for name, record in saved.arrays.items():
            _read(folder, name, record, saved.arrays)
    except DamagedError as error:
        damage = str(error)
    except OtherVersionError as error:
        unknown = str(error)
    except UnreadableError as error:
        unknown = f"could not be checked: {error}"

    # Without metadata there is nothing else to report. Otherwise the report says what is damaged, and what the step
    # holds.
    if saved is None:
        return StepReport(step=folder.step, damage=damage, unknown=unknown)
    return StepReport(
        step=folder.step,
        damage=damage,
        unknown=unknown,
        permanent=saved.permanent,
        metadata=saved.metadata,
        arrays=saved.arrays,
    )


def _read(folder: StepFolder, name: str, record: ArrayInfo, records: dict[str, ArrayInfo]) -> None:
    """Reads one array and checks its digest, with retries."""
    target = jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype))
    with_retries(lambda: read_arrays(folder, {name: target}, records), RefusedError)
