"""Self-describing checkpoints: written asynchronously, committed atomically, verified against digests when read.

A step is a folder with the arrays of a state and a metadata file: the recipe, the tokenizer, the position in the data,
and shape, dtype and digest of every array. A step that is damaged, or that another version of this package wrote, is
reported and skipped; the latest valid step is restored.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> from looplm_jax.checkpoints import CheckpointStore, Metadata, inspect_steps, restore_params
    >>> folder, state = tempfile.mkdtemp(), {"params": {"gate": jnp.ones(3)}}
    >>> metadata = Metadata(config={}, tokenizer_kind="", tokenizer=b"", tokenizer_fingerprint="", data_state={"at": 7})
    >>> CheckpointStore(folder, keep=2, asynchronous=False).save(7, state, metadata)
    >>> restore_params(folder, jax.eval_shape(lambda: state["params"])).state["gate"].tolist()
    [1.0, 1.0, 1.0]
    >>> [(report.step, report.problem) for report in inspect_steps(folder)]
    [(7, None)]

The names in groups:

* The checkpoints of one run: `CheckpointStore` saves, prunes and restores. `SaveError` means that a step was not saved
  but training can continue.
* Reading: `read_metadata` reads no array, `restore_params` reads one part of a state into given shardings. They return
  `Metadata` and `Restored`; `SkippedStep` is a newer step that was skipped.
* Arrays by name, without a pytree: `read_raw`, `write_raw` and `read_array_info` with `RawStep` and `ArrayInfo`.
* Inspection: `inspect_steps` checks every array of every step and returns `StepReport`s. `digests` are the digests that
  it compares, which are the same for every sharding.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Digests of arrays, on the devices that hold them.
    from looplm_jax.checkpoints._digest import digests

    # Every step is read in full.
    from looplm_jax.checkpoints._inspect import StepReport, inspect_steps

    # What makes a checkpoint self-describing.
    from looplm_jax.checkpoints._metadata import ArrayInfo, Metadata, SaveError

    # Arrays by their dotted names.
    from looplm_jax.checkpoints._raw import RawStep, read_array_info, read_raw, write_raw

    # Reading one step.
    from looplm_jax.checkpoints._restore import Restored, SkippedStep, read_metadata, restore_params

    # The checkpoints of one run.
    from looplm_jax.checkpoints._store import CheckpointStore

__all__ = [
    "ArrayInfo",
    "CheckpointStore",
    "Metadata",
    "RawStep",
    "Restored",
    "SaveError",
    "SkippedStep",
    "StepReport",
    "digests",
    "inspect_steps",
    "read_array_info",
    "read_metadata",
    "read_raw",
    "restore_params",
    "write_raw",
]
