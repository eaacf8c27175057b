"""Many processes, one run: how they find each other, agree, and end together. It knows nothing of training."""

from looplm_jax.distributed.cluster import ALONE, LOST, Alone, Cluster
from looplm_jax.distributed.joining import Join, check_alone, join
from looplm_jax.distributed.same import check_same, first_on_process_0

__all__ = ["ALONE", "LOST", "Alone", "Cluster", "Join", "check_alone", "check_same", "first_on_process_0", "join"]
