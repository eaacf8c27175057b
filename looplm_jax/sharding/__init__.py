"""One program for one device, a laptop's fake ones and a pod: only the mesh differs."""

from looplm_jax.sharding.mesh import (
    LOGICAL_AXIS_RULES,
    abstract,
    batch_sharding,
    check_batch,
    check_divides,
    make_mesh,
    use_mesh,
)

__all__ = [
    "LOGICAL_AXIS_RULES",
    "abstract",
    "batch_sharding",
    "check_batch",
    "check_divides",
    "make_mesh",
    "use_mesh",
]
