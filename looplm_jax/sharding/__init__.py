"""Meshes, shardings and collectives. The same program runs on one device, on simulated ones and on a pod.

The model and the losses name logical axes only (`batch`, `embed`, `heads`, ...). `LOGICAL_AXIS_RULES` maps them to the
axes of the mesh: `data` and `fsdp` shard the batch, `fsdp` also shards the parameters, `tensor` shards heads,
feed-forward width and vocabulary, and `context` shards the positions of a sequence.

    >>> from looplm_jax.config import MeshConfig
    >>> from looplm_jax.sharding import logical_to_spec, make_mesh, use_mesh
    >>> mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    >>> with use_mesh(mesh):
    ...     print(tuple(logical_to_spec("batch", "sequence", "heads", None)))
    (('data', 'fsdp'), 'context', 'tensor', None)

The names in groups:

* Mesh: `make_mesh`, `use_mesh`; `check_divides`, `check_batch` and `check_sequence` report what does not fit it.
* Shardings: `LOGICAL_AXIS_RULES`, `logical_to_spec`, `batch_sharding`, `abstract_arrays`, `is_divisible`.
* Arrays of several processes: `process_rows`, `place_rows`, `to_host`.
* Functions on shards: `on_each_device` with `all_gather`, `reduce_scatter` and `all_reduce` inside,
  `shard_map_over_tokens`, `token_axes`.
* Context parallelism: `sequence_shards`, `whole_length`, `whole_sequences`, `all_to_all_heads`, `all_to_all_positions`.
* Platform: `target_platform`, `target_kind`, `first_device`, `require_platform`, `require_compilation`.
* Hardware: `Chip`, `CHIPS`, `known_chip`, `topology_name`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Published figures of accelerators.
    from looplm_jax.sharding._hardware import CHIPS, Chip, known_chip, topology_name

    # From logical axes to shardings, and global arrays.
    from looplm_jax.sharding._logical_axes import (
        LOGICAL_AXIS_RULES,
        abstract_arrays,
        batch_sharding,
        is_divisible,
        logical_to_spec,
        place_rows,
        process_rows,
        to_host,
        use_mesh,
    )

    # The mesh and its platform.
    from looplm_jax.sharding._mesh import (
        check_batch,
        check_divides,
        check_sequence,
        first_device,
        make_mesh,
        require_compilation,
        require_platform,
        target_kind,
        target_platform,
    )

    # Functions that run on each device on its shards.
    from looplm_jax.sharding._shard_map import (
        all_gather,
        all_reduce,
        all_to_all_heads,
        all_to_all_positions,
        on_each_device,
        reduce_scatter,
        sequence_shards,
        shard_map_over_tokens,
        token_axes,
        whole_length,
        whole_sequences,
    )

__all__ = [
    "CHIPS",
    "LOGICAL_AXIS_RULES",
    "Chip",
    "abstract_arrays",
    "all_gather",
    "all_reduce",
    "all_to_all_heads",
    "all_to_all_positions",
    "batch_sharding",
    "check_batch",
    "check_divides",
    "check_sequence",
    "first_device",
    "is_divisible",
    "known_chip",
    "logical_to_spec",
    "make_mesh",
    "on_each_device",
    "place_rows",
    "process_rows",
    "reduce_scatter",
    "require_compilation",
    "require_platform",
    "sequence_shards",
    "shard_map_over_tokens",
    "target_kind",
    "target_platform",
    "to_host",
    "token_axes",
    "topology_name",
    "use_mesh",
    "whole_length",
    "whole_sequences",
]
