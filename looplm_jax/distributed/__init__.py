"""Rendezvous, agreement and shutdown of the processes of one run, over TCP.

This package is independent of training. `joining` starts a process's membership, `meeting` is the rendezvous at process
0, `link` is one connection with a heartbeat, `star` is agreement between all processes, and `same` checks that all were
started alike.
"""

from looplm_jax.distributed.cluster import ALONE, LOST, Alone, Cluster
from looplm_jax.distributed.joining import Join, check_alone, join
from looplm_jax.distributed.same import check_same, first_on_process_0

__all__ = ["ALONE", "LOST", "Alone", "Cluster", "Join", "check_alone", "check_same", "first_on_process_0", "join"]
