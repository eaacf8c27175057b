"""Every step of a checkpoint, read in full and checked."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from looplm_jax.checkpoints.errors import DamagedError
from looplm_jax.checkpoints.metadata import ArrayRecord, Metadata
from looplm_jax.checkpoints.reading import candidates
from looplm_jax.checkpoints.step import StepFolder, read_arrays, read_sidecar
from looplm_jax.checkpoints.tree import below


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step holds. `damage` says which part is damaged; `metadata` is None where it cannot be read."""

    step: int
    damage: str | None
    permanent: bool = False
    metadata: Metadata | None = None
    arrays: dict[str, ArrayRecord] = dataclasses.field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Numbers below `params`."""
        return sum(math.prod(record.shape) for record in below(self.arrays, "params").values())

    @property
    def bytes(self) -> int:
        """Size of all arrays in memory."""
        return sum(math.prod(record.shape) * jnp.dtype(record.dtype).itemsize for record in self.arrays.values())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, without the tokeniser itself."""
        metadata = dataclasses.asdict(self.metadata) if self.metadata else {}
        metadata.pop("tokenizer", None)
        return {
            "step": self.step,
            "damage": self.damage,
            "permanent": self.permanent,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "arrays": {name: str(record) for name, record in self.arrays.items()},
            **metadata,
        }


def inspect_steps(path: str, *, step: int | None = None) -> list[StepReport]:
    """A report of every step, newest first, or of `step`; arrays are read one at a time, on the first device.

    Args:
      path: a run folder, its `checkpoints` folder, or the folder of one step.
      step: only this step.

    Raises:
      UserError: `path` is not a checkpoint, or does not hold `step`.
    """
    return [_inspect(folder) for folder in candidates(path, step)]


def _inspect(folder: StepFolder) -> StepReport:
    try:
        sidecar = read_sidecar(folder)
    except DamagedError as error:
        return StepReport(step=folder.step, damage=str(error))
    return StepReport(
        step=folder.step,
        damage=_damage(folder, sidecar.arrays),
        permanent=sidecar.permanent,
        metadata=sidecar.metadata,
        arrays=sidecar.arrays,
    )


def _damage(folder: StepFolder, records: dict[str, ArrayRecord]) -> str | None:
    for name, record in records.items():
        try:
            read_arrays(folder, {name: jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype))}, records)
        except DamagedError as error:
            return str(error)
    return None
