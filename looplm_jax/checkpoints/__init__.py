"""Self-describing checkpoints: written asynchronously, committed atomically, verified against digests when read."""

from looplm_jax.checkpoints.digest import digests
from looplm_jax.checkpoints.errors import SaveError
from looplm_jax.checkpoints.inspecting import StepReport, inspect_steps
from looplm_jax.checkpoints.metadata import Metadata
from looplm_jax.checkpoints.reading import DamagedStep, Restored, read_metadata, restore_params
from looplm_jax.checkpoints.same_run import check_same_run
from looplm_jax.checkpoints.store import CheckpointStore

__all__ = [
    "CheckpointStore",
    "DamagedStep",
    "Metadata",
    "Restored",
    "SaveError",
    "StepReport",
    "check_same_run",
    "digests",
    "inspect_steps",
    "read_metadata",
    "restore_params",
]
