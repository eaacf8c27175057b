"""Meshes, shardings and collectives. The same program runs on one device, on simulated ones and on a pod."""

from looplm_jax.sharding.local import gather, on_each_device, reduce, reduce_sums, token_axes
from looplm_jax.sharding.mesh import (
    LOGICAL_AXIS_RULES,
    abstract,
    batch_sharding,
    check_batch,
    check_divides,
    check_sequence,
    divides,
    make_mesh,
    partition,
    use_mesh,
)
from looplm_jax.sharding.platform import (
    first_device,
    require_compilation,
    require_platform,
    target_kind,
    target_platform,
)
from looplm_jax.sharding.processes import place_rows, process_rows, to_host
from looplm_jax.sharding.sequences import (
    heads_from_devices,
    heads_to_devices,
    sequence_shards,
    whole_length,
    whole_sequences,
)
from looplm_jax.sharding.tokens import on_own_tokens
from looplm_jax.sharding.topology import topology_name

__all__ = [
    "LOGICAL_AXIS_RULES",
    "abstract",
    "batch_sharding",
    "check_batch",
    "check_divides",
    "check_sequence",
    "divides",
    "first_device",
    "gather",
    "heads_from_devices",
    "heads_to_devices",
    "make_mesh",
    "on_each_device",
    "on_own_tokens",
    "partition",
    "place_rows",
    "process_rows",
    "reduce",
    "reduce_sums",
    "require_compilation",
    "require_platform",
    "sequence_shards",
    "target_kind",
    "target_platform",
    "to_host",
    "token_axes",
    "topology_name",
    "use_mesh",
    "whole_length",
    "whole_sequences",
]
