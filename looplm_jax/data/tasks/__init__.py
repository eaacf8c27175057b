"""Synthetic tasks, one module each, with problems generated on demand from a seed."""

from looplm_jax.data.tasks.addition import Addition
from looplm_jax.data.tasks.capo import Capo
from looplm_jax.data.tasks.mano import Mano, Supervise
from looplm_jax.data.tasks.p_hop import PHop, Sequences
from looplm_jax.data.tasks.reachability import Reachability
from looplm_jax.data.tasks.registry import is_task, make_task
from looplm_jax.data.tasks.three_hop import ThreeHop

__all__ = [
    "Addition",
    "Capo",
    "Mano",
    "PHop",
    "Reachability",
    "Sequences",
    "Supervise",
    "ThreeHop",
    "is_task",
    "make_task",
]
